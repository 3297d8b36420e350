"""The comparison of initialisations against its parts computed by hand, and its files."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.report import before_training, before_training_page
from lowrank_jax.experiment.training import start, state
from lowrank_jax.projection import linalg
from tests import running

SETTINGS = before_training.Settings(scales=(0.1, 0.5), methods=("spectral", "kernel_projection"), seeds=2, batch_size=8)
UNNORMALISED = {"model__kwargs": {"widths": (32,)}}


@pytest.fixture(scope="module")
def report():
    config, lines = running.config(**UNNORMALISED), []
    return config, before_training.compare(config, SETTINGS, say=lines.append), lines


def test_every_combination_is_measured_and_told_of(report):
    _, measured, lines = report
    assert [(one.seed, one.scale, one.method) for one in measured] == [
        (seed, scale, method) for seed in (0, 1) for scale in (0.1, 0.5) for method in SETTINGS.methods
    ]
    told, *lines = lines
    assert told.startswith("4 programs to compile, one for each scale and method, which serve all seeds")
    assert len(lines) == 8 and lines[0].startswith("[1/8] seed 0  scale 0.1  spectral") and "eta" in lines[0]
    assert all(one.seconds > 0 and one.compile_seconds > 0 for one in measured)


def risk(w, y):
    """E |relu(wᵀx) - relu(yᵀx)|² under Gaussian x, summed over the columns of w and y `[n, m]`."""
    norms = np.linalg.norm(w, axis=0) * np.linalg.norm(y, axis=0)
    angle = np.arccos(np.clip(np.sum(w * y, axis=0) / np.maximum(norms, 1e-30), -1, 1))
    mixed = norms * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi
    return np.sum((w**2 + y**2).sum(0) / 2 - mixed)


def test_figures_are_those_of_the_parts(report):
    config, measured, _ = report
    one = next(one for one in measured if (one.seed, one.scale, one.method) == (1, 0.1, "kernel_projection"))
    assert one.rank == {"dense1/kernel": 3, "head/kernel": 1}
    init = jax.jit(functools.partial(start.init_dense, config.build_network(), jnp.zeros((1, 8, 8, 1))))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), init(1)["params"])
    images = np.asarray(jax.random.normal(state.key(1, "init-report", 0), (8, 8, 8, 1)), np.float64)
    x = y = images.reshape(8, -1)
    for name, rank in one.rank.items():
        w, bias = (params[name.split("/")[0]][leaf] for leaf in ("kernel", "bias"))
        low = np.matmul(*(np.asarray(factor, np.float64) for factor in lr.projection.kernel_projection(np.float32(w), rank)))
        np.testing.assert_allclose(one.risk[name], risk(w, low) / risk(w, 0 * w), rtol=1e-4)
        x, y = x @ w + bias, y @ low + bias
        x, y = (x, y) if name == "head/kernel" else (np.maximum(x, 0), np.maximum(y, 0))
    x, y = x - x.mean(0), y - y.mean(0)
    np.testing.assert_allclose(one.logit_error, np.sum((x - y) ** 2) / np.sum(x**2), rtol=1e-3)


def test_the_projection_loses_less_of_every_kernel(report):
    _, measured, _ = report
    for spectral, ours in zip(measured[::2], measured[1::2], strict=True):
        assert all(ours.risk[name] <= spectral.risk[name] + 1e-6 for name in ours.risk)


def test_with_batchnorm_it_makes_no_difference_to_the_logits():
    config = running.config(
        model__kwargs={"widths": (32,), "batch_norm": True}, lowrank__rules=({"path": "head/kernel", "method": "none"},)
    )
    spectral, ours = before_training.compare(config, before_training.Settings((0.2,), SETTINGS.methods))
    np.testing.assert_allclose(ours.logit_error, spectral.logit_error, rtol=1e-3)
    assert ours.mean_risk < spectral.mean_risk


def test_with_moments_risks_are_those_under_inputs_that_have_them():
    rng = np.random.default_rng(0)
    plan = lr.plan(nn.Dense(6), np.ones((2, 8), np.float32), [lr.Rule("kernel", rank=2, activation="relu")])
    w, y, x = rng.normal(size=(8, 6)), rng.normal(size=(8, 6)), rng.normal(size=(8, 8))
    moment = x.T @ x
    root = np.linalg.cholesky(moment + linalg.RIDGE * np.diag(np.diag(moment))).T
    given = [{"kernel": np.float32(kernel), "bias": np.zeros(6, np.float32)} for kernel in (w, y)]
    found = before_training.relative_risks(*given, plan, {"kernel": np.float32(moment)})
    np.testing.assert_allclose(found["kernel"], risk(root @ w, root @ y) / risk(root @ w, 0 * w), rtol=1e-4)


def test_images_of_the_data_are_normalised_training_images():
    config = running.config(**UNNORMALISED)
    first, second = before_training._images(config, before_training.Settings(images="data", batch_size=8), 2)
    description = config.description
    stored = datasets.load(description, config.dataset.train_split, None)
    shown = {
        ((image / 255 - description.mean) / description.std).astype(np.float32).round(3).tobytes() for image in stored.images
    }
    for batch in (first, second):
        assert batch.shape == (8, 8, 8, 1)
        assert {np.asarray(image).round(3).tobytes() for image in batch} <= shown


@pytest.mark.slow
def test_on_real_images_moments_keep_more_of_the_function():
    settings = before_training.Settings((0.1,), ("kernel_projection",), images="data", batch_size=64)
    network = {"model__kwargs": {"widths": (32, 24)}}
    [plain] = before_training.compare(running.config(**network), settings)
    [aware] = before_training.compare(running.config(**network, lowrank__moment_batches=3), settings)
    assert aware.logit_error < 0.95 * plain.logit_error


def test_the_report_holds_its_command_tables_and_picture(report, tmp_path):
    config, measured, _ = report
    prefix = tmp_path / "mlp"
    paths = before_training_page.write(
        measured, str(prefix), command="lowrank init-report --x", config=config, settings=SETTINGS
    )
    assert [path.name for path in paths] == ["mlp.md", "mlp.json", "mlp.budgets.png", "mlp.png"]
    text = paths[0].read_text()
    assert (
        "    lowrank init-report --x" in text and "Seeds 0 to 1" in text and "![risk and logit error by scale](mlp.png)" in text
    )
    assert text.count("| dense1/kernel | 64x32 |") == 2
    stored = json.loads(paths[1].read_text())["arms"]
    assert len(stored) == 8 and stored[3]["risk"] == measured[3].risk
    assert "![what is lost by the budget](mlp.budgets.png)" in text
    assert [curve["kind"] for curve in json.loads(paths[1].read_text())["budgets"]] == ["params", "macs"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[2:])


def test_a_budget_and_a_warm_up_do_not_touch_the_scales_that_are_compared():
    settings = before_training.Settings(scales=(0.5,), methods=("spectral",), batch_size=2)
    (plain,) = before_training.compare(running.config(**UNNORMALISED), settings)
    changes = {"lowrank__budget__params": 0.3, "lowrank__dense_warmup": "5 steps"}
    (budget,) = before_training.compare(running.config(**UNNORMALISED, **changes), settings)
    assert budget.rank == plain.rank and budget.risk == plain.risk


def test_all_problems_come_at_once():
    settings = before_training.Settings(scales=(0.1, 1.5), methods=("specral",), images="dat", batch_size=1)
    with pytest.raises(configs.ConfigError) as error:
        before_training.compare(running.config(), settings)
    assert error.value.problems == [
        "--scales: 1.5; must be in (0, 1]",
        "--methods: unknown 'specral'; did you mean spectral?",
        "--images: unknown 'dat'; did you mean data?",
        "--batch-size: 1; must be at least 2",
    ]


def test_more_images_than_there_are_and_duplicates_are_refused():
    settings = before_training.Settings(scales=(0.1, 0.1), images="data", batch_size=500)
    assert settings.problems(running.config(lowrank__moment_batches=2)) == [
        "--scales: contains duplicates",
        "--batch-size: 500; needs 1500 images in total, the training split has 1437",
    ]


def test_seeds_and_images_without_end_are_refused():
    seeds, images = before_training.Settings(seeds=10**14, batch_size=10**13).problems(running.config())
    assert seeds == "--seeds: 100000000000000; must be from 1 to 1000"
    assert images.startswith("--batch-size: its images: 2.56PB; this machine has ")


def test_a_kernel_of_zeros_loses_nothing():
    plan = lr.plan(nn.Dense(6), np.ones((2, 8), np.float32), [lr.Rule("kernel", rank=2)])
    params = {"kernel": np.zeros((8, 6), np.float32), "bias": np.zeros(6, np.float32)}
    merged = jax.jit(lambda params: lr.merge(lr.factorize(params, plan, key=jax.random.key(1))))(params)
    assert before_training.relative_risks(params, merged, plan) == {"kernel": 0.0}


def test_data_that_is_missing_and_kernels_that_stay_dense_are_said(tmp_path):
    config = running.config(dataset__name="fashion_mnist", dataset__data_dir=str(tmp_path))
    with pytest.raises(datasets.DataError, match="fashion_mnist is not prepared"):
        before_training.compare(config, before_training.Settings(images="data"))
    with pytest.raises(configs.ConfigError, match="at scale 1 no kernel of this network would be factored"):
        before_training.compare(running.config(), before_training.Settings(scales=(1.0,)))


def test_the_time_left_counts_what_is_still_to_be_compiled(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock, left = before_training._Clock(total=6, programs=3), []
    for took, compiling in ((19, 10), (11, 10), (13, 12), (1, 0), (1, 0), (1, 0)):
        now[0] += took
        left.append(clock.left(compiling))
    assert left == [2 * 10 + 5 * 9, 10 + 4 * 5, 3 * 1, 2 * 1, 1, 0]
    assert [before_training.short_time(seconds) for seconds in (123.456, 0.001234, 0.5)] == ["123.46", "0.0012", "0.5"]


def test_kernels_whose_ranks_are_open_are_named_and_stay_dense(tmp_path):
    rules = ({"path": "dense1/kernel", "energy": 0.9},)
    config = running.config(**UNNORMALISED, lowrank__rules=rules, lowrank__dense_warmup="5 steps")
    settings, said = before_training.Settings(scales=(0.5,), methods=("spectral",), batch_size=2), []
    (measured,) = before_training.compare(config, settings, say=said.append)
    note = "dense1/kernel: dense here, by a rule with an energy, whose ranks are open until the dense warm-up ends"
    assert "dense1/kernel" not in measured.rank and measured.rank and note in said
    page, *_ = before_training_page.write([measured], str(tmp_path / "mlp"), command="x", config=config, settings=settings)
    text = page.read_text()
    assert f"{note}." in text and "trained kernels alone tell, bound no rank here" in text
    config = running.config(lowrank__rules=({"path": ".*", "energy": 0.9},), lowrank__dense_warmup="5 steps")
    with pytest.raises(
        configs.ConfigError, match="no kernel of this network would be factored; the ranks of energies are open"
    ):
        before_training.compare(config, settings)
