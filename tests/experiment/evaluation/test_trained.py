"""A restored network, called on raw images."""

import dataclasses
import json
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lowrank_jax as lr
import lowrank_jax.experiment as lx
from lowrank_jax.experiment.cli.commands import main
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.kernel import is_low_rank
from tests import running


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "run"
    small = {"model__kwargs": {"widths": (32,), "batch_norm": True}, "lowrank__method": "spectral", "dataset__mixup": 0.0}
    train(running.config(**small, optim__ema_decay=0.9, eval__every="20 steps", checkpoint__every="20 steps"), str(folder))
    return folder


@pytest.fixture(scope="module")
def net(trained):
    return lx.restore(trained)


@pytest.fixture(scope="module")
def examples():
    return datasets.load(datasets.describe("digits", {}), "test", None).plain(np.arange(360))


def by_hand(net, variables, images):
    """Normalised in float64, and run by flax alone or by the library."""
    normal = ((images / 255.0 - net.dataset.mean) / net.dataset.std).astype(np.float32)
    return np.asarray(lr.apply(net.model, variables, normal, train=False))


def test_it_computes_what_its_variables_say_of_images_that_are_normalised(net, examples):
    logits = net(examples["image"])
    assert isinstance(logits, np.ndarray) and (logits.dtype, logits.shape) == (np.float32, (360, 10))
    np.testing.assert_allclose(logits, by_hand(net, net.variables, examples["image"]), rtol=1e-4, atol=1e-4)


def test_it_is_what_was_evaluated_with_averaged_weights_or_raw_ones(trained, net, examples):
    result = json.loads((trained / "result.json").read_text())
    for network, metrics in ((net, result["eval"]), (lx.restore(trained, raw=True), result["eval_raw"])):
        logits = network(examples["image"]).astype(np.float64)
        assert (logits.argmax(-1) == examples["label"]).mean() == metrics["top1"]
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(360), examples["label"]]
        assert losses.mean() == pytest.approx(metrics["loss"], rel=1e-4)


@pytest.mark.parametrize("size", [0, 1, 3, 8, 65, 360])
def test_any_batch_size_gives_the_same(net, examples, size):
    images = examples["image"][:size]
    whole = by_hand(net, net.variables, examples["image"])[:size]
    for given in (images, jnp.asarray(images), jax.device_put(images, jax.devices()[3])):
        logits = net(given)
        assert isinstance(logits, np.ndarray if given is images else jax.Array) and logits.shape == (size, 10)
        np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-4)


def test_few_sizes_are_compiled(trained, examples):
    fresh: Any = lx.restore(trained)
    for size in range(1, 65):
        fresh(examples["image"][:size])
    assert fresh._forward._cache_size() == 4  # 8, 16, 32 and 64 on eight devices


def test_it_can_be_traced(net, examples):
    images = jnp.asarray(examples["image"][:8])
    np.testing.assert_allclose(jax.jit(net)(images), net(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 1), np.uint8), r"the shape \[8, 8, 1\]; expected \[batch, 8, 8, 1\]; images\[None\] makes a batch"),
        (np.zeros((2, 28, 28, 1), np.uint8), r"the shape \[2, 28, 28, 1\]; expected \[batch, 8, 8, 1\]$"),
        (np.uint8(0), r"the shape \[\]; expected"),
        (np.zeros((2, 8, 8, 1), np.float32), "images are float32; digits has uint8, from 0 to 255"),
        (jnp.zeros((2, 8, 8, 1), jnp.int32), "images are int32; digits has uint8"),
        (np.zeros((2, 8, 8, 1), bool), "images are bool; digits has uint8"),
        ([[1, 2]], "images must be an array, not a list"),
        ("image.png", "images must be an array, not a str"),
    ],
)
def test_other_shapes_and_types_are_refused_by_name(net, images, message):
    with pytest.raises(lx.UserError, match=message):
        net(images)


def test_where_the_data_has_floating_point_numbers_whole_ones_are_refused(net):
    other = dataclasses.replace(net, dataset=dataclasses.replace(net.dataset, image_dtype="float32"))
    with pytest.raises(lx.UserError, match="images are uint8; digits has floating-point numbers"):
        other(np.zeros((2, 8, 8, 1), np.uint8))


def test_merged_it_is_the_plain_model(net, examples):
    merged = net.merged()
    plain = merged.variables["params"]
    assert any(map(is_low_rank, jax.tree.leaves(net.variables["params"], is_leaf=is_low_rank)))
    assert not any(map(is_low_rank, jax.tree.leaves(plain, is_leaf=is_low_rank)))
    shapes = jax.eval_shape(lambda: net.model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))["params"]
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    logits = net(examples["image"])
    np.testing.assert_allclose(merged(examples["image"]), logits, rtol=1e-4, atol=1e-4)
    normal = ((examples["image"] / 255.0 - net.dataset.mean) / net.dataset.std).astype(np.float32)
    np.testing.assert_allclose(net.model.apply(merged.variables, normal, train=False), logits, rtol=1e-4, atol=1e-4)


def test_it_says_what_it_is(trained, net):
    assert net.class_names == tuple("0123456789") and net.step == 40
    assert net.config == lx.load_config(lx_config(trained)) and net.plan.factored
    assert len(repr(net)) < 2000


def lx_config(trained):
    """The stored config as a config file would return it."""
    from lowrank_jax.experiment.config import default, override

    given = default()
    for section, values in json.loads((trained / "config.json").read_text()).items():
        for key, value in values.items() if isinstance(values, dict) else [(None, values)]:
            override(given, f"{section}.{key}" if key else section, str(value))
    return given


def test_a_step_is_chosen_as_for_an_evaluation(trained, examples):
    first = lx.restore(trained, 20)
    assert first.step == 20 and lx.restore(str(trained), "20").step == 20
    best = lx.restore(trained, "best").step
    assert best == json.loads((trained / "result.json").read_text())["best_step"]
    assert (first(examples["image"]) != lx.restore(trained)(examples["image"])).any()
    with pytest.raises(lx.CheckpointError, match=r"has no step 7; choose from \[20, 40\], latest or best"):
        lx.restore(trained, 7)


def test_a_damaged_checkpoint_is_warned_about_and_the_one_before_it_used(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "40").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.warns(UserWarning, match="run: checkpoint 40 cannot be used"):
        assert lx.restore(tmp_path / "run").step == 20
    with pytest.warns(UserWarning, match="run: checkpoint 40 cannot be used"):
        assert lx.evaluate(tmp_path / "run").step == 20


def test_it_needs_no_data(trained, examples, monkeypatch):
    def refuse(*args):
        raise AssertionError("data was read")

    monkeypatch.setattr(datasets, "load", refuse)
    assert lx.restore(trained)(examples["image"][:1]).shape == (1, 10)


def test_code_that_nobody_trusts_is_not_imported(trained, tmp_path, monkeypatch):
    (tmp_path / "payload_of_a_network.py").write_text(
        f"import pathlib\nfrom lowrank_jax.models import MLP as Model\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "payload_of_a_network", raising=False)
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["name"] = "payload_of_a_network:Model"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for use in (lx.restore, lx.evaluate):
        with pytest.raises(lx.UntrustedCode, match=r"model\.name 'payload_of_a_network:Model'") as raised:
            use(tmp_path / "run")
        assert str(raised.value).endswith(" To import it: trust_code=['payload_of_a_network:Model']")
        assert not (tmp_path / "ran").exists()
    with pytest.raises(lx.WorkdirError, match="another experiment"):  # as its records know
        lx.restore(tmp_path / "run", trust_code=["payload_of_a_network:Model"])
    assert (tmp_path / "ran").exists()


def test_code_of_the_data_is_not_imported_where_its_record_serves(tmp_path, monkeypatch):
    """Of a run with extensions, whose lengths depend on the size of the data."""
    code, run = tmp_path / "data_of_a_test.py", tmp_path / "run"
    code.write_text(
        "import numpy as np\n"
        "def splits():\n"
        "    images = np.random.default_rng(0).integers(0, 256, (64, 6, 6, 3), np.uint8)\n"
        "    return {'train': (images, np.arange(64) % 3), 'test': (images, np.arange(64) % 3)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"dataset__name": "data_of_a_test:splits", "dataset__crop_padding": 0, "dataset__mixup": 0.0, "epochs": 3}
    train(
        running.config(
            **own, extensions=(("2 epochs", "constant"),), steps=None, eval__every="1 epochs", optim__warmup="1 steps"
        ),
        str(run),
    )
    code.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    sys.modules.pop("data_of_a_test")
    Image.new("RGB", (6, 6)).save(tmp_path / "a.png")

    net = lx.restore(run, "best")
    assert net(np.zeros((2, 6, 6, 3), np.uint8)).shape == (2, 3) and net.merged().plan is net.plan
    assert [prediction.error for prediction in net.predict(tmp_path / "a.png")] == [""]
    assert repr(net) == f"<TrainedNetwork MLP of data_of_a_test:splits, step {net.step}>"
    with pytest.raises(SystemExit, match="0"):
        main(["predict", f"--workdir={run}", str(tmp_path / "a.png")])
    with pytest.raises(lx.UntrustedCode, match=r"dataset\.name 'data_of_a_test:splits'"):
        lx.evaluate(run)
    record = json.loads((run / "dataset.json").read_text())
    for spoiled in ({**record, "name": "other:splits"}, {**record, "digest": ""}, None):
        (run / "dataset.json").unlink()
        if spoiled:
            Workdir(run).write_json("dataset.json", {key: value for key, value in spoiled.items() if key != "check"})
        with pytest.raises(lx.UntrustedCode, match=r"dataset\.name 'data_of_a_test:splits'"):
            lx.restore(run)
    assert not (tmp_path / "ran").exists() and "data_of_a_test" not in sys.modules
