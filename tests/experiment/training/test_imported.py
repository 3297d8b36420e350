"""The first state of a run from trained weights: its ranks go by them, on any number of devices and processes."""

import json

import jax
import numpy as np
import pytest

import lowrank_jax as lr
import lowrank_jax.experiment as lx
from lowrank_jax.experiment.config.plan import forecast
from lowrank_jax.experiment.report.page import Report
from lowrank_jax.experiment.sweep import trials
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.overview import overview
from lowrank_jax.experiment.training.state import key
from lowrank_jax.paths import named_leaves
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

TWO_SIDED = {
    "lowrank__method": "two_sided",
    "lowrank__moment_batches": 2,
    "lowrank__budget": {"params": 0.5, "objective": "divergence"},
    "steps": 12,
    "checkpoint__every": "4 steps",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "run"
    train(running.config(lowrank__method="none", optim__lr=0.3), str(folder))
    return folder


def _config(dense, **changes):
    return running.config(**{**TWO_SIDED, **changes}, init__weights=str(dense))


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(_config(dense), str(folder))


def _ranks(folder):
    """Of what is factored."""
    record = json.loads((folder / "ranks.json").read_text())["ranks"]
    return {name: entry["rank"] for name, entry in record.items() if entry}


def test_ranks_and_factors_are_those_of_the_library(dense, whole, tmp_path):
    """By its own functions, on the same batches: they come first in training, and are not augmented twice."""
    config = _config(dense, optim__lr=1e-30, optim__weight_decay=0.0)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        measure = lr.inputs.gradient_moments

        def watched(model, variables, batches, *args, **kwargs):
            batches = list(batches)
            seen.extend(batches)
            return measure(model, variables, batches, *args, **kwargs)

        patch.setattr("lowrank_jax.inputs.gradient_moments", watched)
        run = train(config, str(tmp_path / "run"))
    assert [batch.shape for batch in seen] == [(32, 8, 8, 1)] * 2
    network = lx.restore(dense)
    variables = jax.device_get(network.variables)
    plan = lr.plan(network.model, jax.numpy.zeros((1, 8, 8, 1)), config.lowrank.to_rules(), train=False).opened()
    images = [np.asarray(batch) for batch in seen]
    drawn = {"key": key(config.seed, "gradients"), "loss": "softmax"}
    known = {"gradients": measure(network.model, variables, images, plan, **drawn, train=False)}
    plan = lr.allocate(plan, params=0.5, objective="divergence", variables=variables, **known)
    assert _ranks(tmp_path / "run") == {kernel.name: kernel.rank for kernel in plan.factored} == _ranks(whole[0])
    expected = lr.factorize(variables["params"], plan, key=key(config.seed, "factorize"), **known)
    found = named_leaves(lr.merge(run.state.params))
    for name, leaf in named_leaves(lr.merge(expected)).items():
        np.testing.assert_allclose(found[name], leaf, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("killed", [0, 2, 9])
def test_a_run_that_is_killed_resumes_to_the_same_bits(dense, whole, tmp_path, killed):
    """Where its ranks are recorded and nothing is saved, the layers are measured again."""
    with running.dying_after(killed):
        train(_config(dense), str(tmp_path / "run"))
    assert (tmp_path / "run" / "ranks.json").exists()
    running.assert_same(train(_config(dense), str(tmp_path / "run")).state, whole[1].state)


def test_energies_go_by_the_weights(dense, tmp_path):
    rules = ({"path": "dense1/kernel", "energy": 0.8}, {"path": ".*", "method": "none"})
    changes = {"lowrank__method": "spectral", "lowrank__budget": {}, "lowrank__moment_batches": 0, "lowrank__rules": rules}
    train(_config(dense, **changes), str(tmp_path / "run"))
    values = np.linalg.svd(np.asarray(lx.restore(dense).variables["params"]["dense1"]["kernel"], np.float64))[1]
    shares = np.cumsum(values**2) / np.sum(values**2)
    assert _ranks(tmp_path / "run") == {"dense1/kernel": int(np.searchsorted(shares, 0.8)) + 1}


def test_what_is_known_before_the_weights_are_is_called_a_forecast(dense, whole, capsys, tmp_path):
    config = _config(dense)
    text = overview(config, 1)
    first = "By shapes and costs alone; ranks are chosen as the run begins, from the weights that it is given"
    assert text.startswith(f"{first}\n\n") and "warm-up" not in text
    rules = ({"path": "dense1/kernel", "energy": 0.8},)
    energies = _config(
        dense,
        lowrank__rules=rules,
        lowrank__budget={},
        lowrank__method="spectral",
        lowrank__scale=0.5,
        lowrank__moment_batches=0,
    )
    text = overview(energies, 1)
    assert "the rank is open until the run begins; dense here" in text and "warm-up" not in text
    assert "then" not in forecast(energies)
    train(config, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "parameters by a forecast; 12 steps" in said and "warm-up" not in said
    known = (tmp_path / "run" / "overview.txt").read_text()
    assert "warm-up" not in known and "By shapes" not in known and known.startswith("parameter ")


def test_a_sweep_and_a_report_take_runs_from_weights(dense, whole, tmp_path):
    settings = running.settings(**TWO_SIDED, epochs=None, lowrank__rules=(), init__weights=str(dense))
    overrides = [(name, str(value)) for name, value in settings.items()]
    source = str(running.ROOT / "configs" / "digits_resnet.py")
    expanded = trials.expand(source, overrides, "lowrank.budget.params=0.3,0.5", str(tmp_path))
    table = expanded.table()
    assert "Params and MACs: by shapes and costs alone; ranks are chosen as the run begins" in table and "warm-up" not in table
    Report([str(dense), str(whole[0])]).write(str(tmp_path / "report"))
    page = next(iter((tmp_path / "report").parent.rglob("*.md")), None) or next(iter(tmp_path.rglob("*.html")))
    assert "two_sided" in page.read_text()


@pytest.mark.slow
def test_devices_and_processes_do_not_change_what_is_chosen(dense, tmp_path):
    """Ranks are the same, and factors up to the order of sums; the first process of two says what they both find."""
    flags = {**TWO_SIDED, "init__weights": str(dense), "eval__every": "4 steps"}
    for devices in (1, 8):
        ended = running.run(running.command(tmp_path / str(devices), "compress", **flags), devices=devices)
        assert ended.returncode == 0, ended.stderr
        assert "agreement" in ended.stdout
    processes = running.start_all(running.command(tmp_path / "two", "compress", **flags), 2)
    said = running.wait_all(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert "agreement" in said[0] and "agreement" not in said[1]
    ranks = [_ranks(tmp_path / name) for name in ("1", "8", "two")]
    assert ranks[0] == ranks[1] == ranks[2] and any(ranks[0].values())
    one, *others = (named_leaves(lx.restore(tmp_path / name).merged().variables) for name in ("1", "8", "two"))
    for other in others:
        for name, leaf in one.items():
            np.testing.assert_allclose(leaf, other[name], atol=2e-5, err_msg=name)
    records = [json.loads((tmp_path / name / "compression.json").read_text()) for name in ("1", "8", "two")]
    assert np.ptp([record["fidelity"]["kl"] for record in records]) < 1e-5
    assert len({json.loads((tmp_path / name / "weights.json").read_text())["digest"] for name in ("1", "8", "two")}) == 1
