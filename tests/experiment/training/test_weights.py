"""Trained weights that a run begins with: where they come from, what does not fit, and whose they are."""

import dataclasses
import json
import shutil
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import lowrank_jax.experiment as lx
from lowrank_jax.experiment.config import ConfigError
from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.training import weights
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.start import blank_images, init_dense
from lowrank_jax.paths import named_leaves
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

SHORT = {"steps": 12, "checkpoint__every": "4 steps", "lowrank__method": "spectral", "lowrank__scale": None, "lowrank__rank": 8}
FULL = {**SHORT, "optim__lr": 1e-30, "optim__weight_decay": 0.0}
"""Steps that change no parameter."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A trained dense network, of another normalisation than the data's own."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    pixels = {"dataset__mean": (0.25,), "dataset__std": (0.5,)}
    train(running.config(lowrank__method="none", optim__lr=0.3, eval__every="10 steps", **pixels), str(folder))
    return folder


@pytest.fixture(scope="module")
def arrays(dense):
    """Its variables by path."""
    return named_leaves(jax.device_get(lx.restore(dense).variables))


@pytest.fixture(scope="module")
def file(arrays, tmp_path_factory):
    return _saved(arrays, tmp_path_factory.mktemp("file") / "dense.safetensors")


def _saved(arrays, path, **changes):
    save_file({name: np.ascontiguousarray(array) for name, array in {**arrays, **changes}.items()}, path)
    return path


@pytest.fixture(scope="module")
def thin(arrays, tmp_path_factory):
    """A file with kernels that factors of rank 8 are exact for, and what is in it."""
    cut = dict(arrays)
    for name in (name for name in arrays if name.endswith("/kernel")):
        u, s, v = np.linalg.svd(arrays[name].astype(np.float64), full_matrices=False)
        cut[name] = ((u[:, :6] * s[:6]) @ v[:6]).astype(np.float32)
    return _saved(cut, tmp_path_factory.mktemp("thin") / "thin.safetensors"), cut


def _config(source, **changes):
    return running.config(**{**SHORT, **changes}, init__weights=str(source))


def _of(config) -> dict[str, Any]:
    return named_leaves(weights.read(config).variables)


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def _steps(folder):
    return sorted(int(step.name) for step in (folder / "checkpoints").iterdir() if step.name.isdigit())


@pytest.mark.parametrize("kind", ["work directory", "step", "safetensors", "orbax", "orbax, nested in a folder"])
def test_every_source_gives_the_weights_bit_by_bit(dense, arrays, file, tmp_path, kind):
    variables = lx.restore(dense).variables
    if kind.startswith("orbax"):
        tmp_path = tmp_path / "a" / "b" if "nested" in kind else tmp_path
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path.absolute() / "saved", jax.device_get(variables))
    source = {"work directory": dense, "step": f"{dense}@40", "safetensors": file}.get(kind, tmp_path / "saved")
    _assert_same(_of(_config(source)), arrays)


@pytest.mark.parametrize("step", ["30", "best"])
def test_a_step_of_a_run_may_be_named(dense, arrays, step):
    _assert_same(_of(_config(f"{dense}@{step}")), named_leaves(lx.restore(dense, step=step).variables))
    if step == "30":
        assert (_of(_config(f"{dense}@{step}"))["params/head/kernel"] != arrays["params/head/kernel"]).any()


def test_averaged_weights_are_taken_where_a_run_keeps_them(tmp_path):
    train(running.config(lowrank__method="none", steps=10, optim__ema_decay=0.5), str(tmp_path / "run"))
    found = _of(_config(tmp_path / "run"))
    _assert_same(found, named_leaves(lx.restore(tmp_path / "run").variables))
    raw = named_leaves(lx.restore(tmp_path / "run", raw=True).variables)
    assert (found["params/head/kernel"] != raw["params/head/kernel"]).any()


def test_a_low_rank_run_is_multiplied_out(tmp_path):
    train(running.config(steps=10), str(tmp_path / "low"))
    pairs = lx.restore(tmp_path / "low").variables["params"]
    found = _of(_config(tmp_path / "low"))
    for layer in ("dense1", "dense2"):
        pair = pairs[layer]["kernel"]
        product = np.asarray(pair.u, np.float64) @ np.asarray(pair.v, np.float64)
        np.testing.assert_allclose(found[f"params/{layer}/kernel"], product, atol=1e-6)
    np.testing.assert_array_equal(found["params/head/bias"], pairs["head"]["bias"])


_LAYERS = {"stem/conv": "conv1", "stem/norm": "bn1", "head": "fc"}
_IN_BLOCK = {"norm1": "bn1", "norm2": "bn2", "proj": "downsample.0", "proj_norm": "downsample.1"}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _timms(path, value):
    """A variable of a ResNet as PyTorch has it."""
    _, *layer, leaf = path.split("/")
    if layer[0].startswith("stage"):
        stage, block, inner = layer
        name = f"layer{stage[5:]}.{int(block[5:]) - 1}.{_IN_BLOCK.get(inner, inner)}"
    else:
        name = _LAYERS["/".join(layer)]
    value = {4: lambda v: v.transpose(3, 2, 0, 1), 2: np.transpose, 1: np.asarray}[value.ndim](value)
    return f"{name}.{_LEAVES.get(leaf, leaf)}", np.ascontiguousarray(value)


def test_weights_of_timm_have_their_places_and_their_pixels(tmp_path):
    model = {"model__name": "resnet18", "model__kwargs": {"widths": (8, 8, 16, 16)}, "dataset__name": "digits"}
    config = running.config(**{**SHORT, **model})
    drawn = jax.jit(lambda seed: init_dense(config.build_network(), blank_images(config.description), seed))(np.uint32(3))
    draw = np.random.default_rng(0)
    expected = {name: draw.uniform(0.5, 1.5, leaf.shape).astype(np.float32) for name, leaf in named_leaves(drawn).items()}
    state = dict(_timms(name, value) for name, value in expected.items())
    save_file({**state, "bn1.num_batches_tracked": np.zeros((), np.int64)}, tmp_path / "r18.safetensors")
    source = f"timm:resnet18={tmp_path / 'r18.safetensors'}"
    _assert_same(_of(_config(source, **model)), expected)
    assert weights.pixels(source) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    del state["layer1.0.conv1.weight"]
    save_file(state, tmp_path / "r18.safetensors")
    with pytest.raises(ConfigError, match=r"params/stage1/block1/conv1/kernel: has no array"):
        weights.read(_config(source, **model))
    with pytest.raises(ConfigError, match=r"init.weights: timm:resnet19=.*'resnet19'; did you mean resnet18"):
        weights.read(_config(source.replace("18=", "19="), **model))


@pytest.mark.parametrize("method", ["spectral", "two_sided"])
def test_a_network_of_enough_rank_computes_what_the_weights_do(dense, thin, tmp_path, method):
    source, variables = thin
    calibrated = {"lowrank__method": method, "lowrank__moment_batches": 1, "dataset__mean": (0.25,), "dataset__std": (0.5,)}
    made = lx.compress(_config(source, **calibrated), tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), np.uint8)
    ours, theirs = lx.restore(tmp_path / "run"), lx.restore(dense)
    exact = dataclasses.replace(theirs, variables=flax.traverse_util.unflatten_dict(variables, sep="/"))
    assert len(ours.plan.factored) == 2 and made.fidelity.agreement == 1.0
    np.testing.assert_allclose(ours(images), exact(images), atol=2e-5)
    assert np.abs(exact(images) - theirs(images)).max() > 0.01  # rank 6 is another network


def test_pixels_are_those_of_the_source_unless_the_config_says_otherwise(dense, tmp_path, capsys):
    train(_config(dense, **FULL), str(tmp_path / "theirs"))
    assert "pixels are normalised as for the weights: mean (0.25,), standard deviation (0.5,)" in capsys.readouterr().out
    train(_config(dense, **FULL, dataset__mean=(0.1,), dataset__std=(0.2,)), str(tmp_path / "ours"))
    said = capsys.readouterr().out
    assert "dataset.mean and .std are (0.1,) and (0.2,); the weights were trained with (0.25,) and (0.5,)" in said
    assert [lx.restore(tmp_path / name).dataset.mean for name in ("theirs", "ours")] == [(0.25,), (0.1,)]


@pytest.mark.parametrize(
    "changes",
    [
        {"lowrank__method": "none"},
        {"lowrank__dense_warmup": "6 steps"},
        {"lowrank__self_guided": "6 steps"},
        {"lowrank__self_guided": "6 steps", "lowrank__rank": None, "lowrank__budget": {"params": 0.9}},
        {"lowrank__method": "two_sided", "lowrank__moment_batches": 1},
        {"lowrank__method": "two_sided", "lowrank__moment_batches": 1, "lowrank__scale": 1.0, "lowrank__rank": None},
        {
            "lowrank__method": "two_sided",
            "lowrank__moment_batches": 1,
            "lowrank__rank": None,
            "lowrank__budget": {"params": 1.0},
        },
        {"init__svd": "host"},
        {"lowrank__dense_warmup": "6 steps", "lowrank__rules": ({"path": "dense.*", "energy": 0.9999999},)},
    ],
    ids=str,
)
def test_all_kinds_of_training_begin_with_the_weights(thin, tmp_path, changes):
    source, arrays = thin
    run = train(_config(source, **{**FULL, **changes}), str(tmp_path / "run"))
    assert int(run.state.step) == 12
    whole = changes.get("lowrank__method") == "none" or changes.get("lowrank__scale") == 1.0
    assert bool(lx.restore(tmp_path / "run").plan.factored) != whole or "lowrank__budget" in changes
    if "lowrank__budget" in changes:
        assert json.loads((tmp_path / "run/ranks.json").read_text())["step"] == 0
    found = named_leaves(lx.restore(tmp_path / "run").merged().variables["params"])
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, arrays[f"params/{name}"], atol=2e-5, err_msg=name)


def test_whatever_does_not_fit_is_named_at_once(arrays, tmp_path):
    wrong = {
        "params/head/kernel": np.zeros((32, 7), np.float32),
        "params/head/bias": np.zeros(7, np.float32),
        "params/norm1/bias": np.full(32, np.nan, np.float32),
        "params/dense9/bias": np.zeros(3, np.float32),
    }
    kept = {name: array for name, array in arrays.items() if name != "params/dense2/kernel"}
    source = _saved(kept, tmp_path / "wrong.safetensors", **wrong)
    with pytest.raises(ConfigError) as error:
        train(_config(source), str(tmp_path / "run"))
    for problem in (
        f"init.weights: {source}: the weights do not fit the model:",
        "params/head/kernel: is [32, 7], not [32, 10]",
        "params/head/bias: is [7], not [10]",
        "params/norm1/bias: has values that are not finite",
        "params/dense9/bias: is left over",
        "params/dense2/kernel: has no array",
    ):
        assert problem in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pattern", ["head/.*", "params/head/.*"])
def test_a_head_for_other_classes_is_drawn_anew(arrays, tmp_path, pattern):
    other = {"params/head/kernel": np.zeros((32, 7), np.float32), "params/head/bias": np.zeros(7, np.float32)}
    config = _config(_saved(arrays, tmp_path / "seven.safetensors", **other), init__redraw=pattern)
    found, network = _of(config), config.build_network()
    drawn = named_leaves(jax.jit(lambda: init_dense(network, blank_images(config.description), np.uint32(config.seed)))())
    for name in arrays:
        expected = drawn[name] if name.startswith("params/head") else arrays[name]
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    assert np.ptp(found["params/head/kernel"]) > 0


def test_what_redraw_may_not_say(file):
    with pytest.raises(ConfigError, match=r"init\.redraw: says nothing without init.weights"):
        running.config(init__redraw="head/.*")
    with pytest.raises(ConfigError, match=r"init.redraw: .*\("):
        _config(file, init__redraw="head/(")
    with pytest.raises(ConfigError, match=r"redraw: 'hat/.\*' matches no path"):
        weights.read(_config(file, init__redraw="hat/.*"))


SOURCES = {
    "nowhere": "there is no such file or folder",
    "nowhere@best": "there is no such file or folder",
    "nowhere.safetensors": "No such file",
    "empty.safetensors": "is no file of safetensors, or it is damaged",
    "folder.safetensors": "is a folder",
    "file.pth": r"must be timm:NAME=FILE, or a .safetensors file \(timm:NAME=FILE\)|there is no such file or folder",
    "folder": "neither a work directory nor a checkpoint of orbax",
    "untrained": "there is no checkpoint|no checkpoint",
    "dense@7": "7",
    "dense@first": "first",
    "timm:resnet18": "must be timm:NAME=FILE",
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_none_is_refused_before_a_folder_is_made(dense, tmp_path, source):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "untrained").mkdir()
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "file.pth").touch()
    shutil.copy(dense / "config.json", tmp_path / "untrained")
    shutil.copy(dense / "dataset.json", tmp_path / "untrained")
    (tmp_path / "dense").symlink_to(dense)
    place = source if source.startswith("timm") else str(tmp_path / source)
    with pytest.raises(ConfigError, match=SOURCES[source]) as error:
        train(_config(place), str(tmp_path / "run"))
    assert f"init.weights: {place}" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_its_own_source(dense, tmp_path):
    with pytest.raises(WorkdirError, match=r"belongs to another experiment: .*init\.weights is None there"):
        train(_config(dense, lowrank__method="none", steps=40), str(dense))
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        train(_config(tmp_path / "run"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_weights_belong_to_the_experiment(dense, file, tmp_path):
    train(_config(file), str(tmp_path / "run"))
    for changes in ({"source": dense}, {"source": file, "init__redraw": "head/.*"}):
        with pytest.raises(WorkdirError, match=r"belongs to another experiment: init\.(weights|redraw) is"):
            train(_config(**changes), str(tmp_path / "run"))


@pytest.fixture(scope="module")
def undisturbed(file, tmp_path_factory):
    """A run from a file."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, train(_config(file), str(folder))


def _moved(undisturbed, file, tmp_path):
    """A config of the same run from a copy of the file, which may change."""
    shutil.copy(file, tmp_path / "copy.safetensors")
    return _config(tmp_path / "copy.safetensors")


def test_before_its_first_checkpoint_a_run_needs_the_weights_that_it_began_with(undisturbed, arrays, file, tmp_path):
    config, folder, copy = _moved(undisturbed, file, tmp_path), tmp_path / "run", tmp_path / "copy.safetensors"
    with running.dying_after(2):
        train(config, str(folder))
    assert _steps(folder) == []
    record = (folder / "weights.json").read_text()
    copy.unlink()
    with pytest.raises(ConfigError, match=r"init.weights: .*copy.safetensors: No such file"):
        train(config, str(folder))
    _saved(arrays, copy, **{"params/head/bias": arrays["params/head/bias"] + 1})
    with pytest.raises(WorkdirError, match=r"began with other weights than .*copy.safetensors has now; put them back, or use"):
        train(config, str(folder))
    assert (folder / "weights.json").read_text() == record
    shutil.copy(file, copy)
    running.assert_same(train(config, str(folder)).state, undisturbed[1].state)


@pytest.mark.parametrize("fate", ["gone", "changed"])
def test_after_its_first_checkpoint_a_run_needs_no_source(undisturbed, arrays, file, tmp_path, fate):
    config, folder, copy = _moved(undisturbed, file, tmp_path), tmp_path / "run", tmp_path / "copy.safetensors"
    with running.dying_after(6):
        train(config, str(folder))
    assert _steps(folder) == [4]
    copy.unlink()
    if fate == "changed":
        _saved(arrays, copy, **{"params/head/bias": arrays["params/head/bias"] + 1})
    running.assert_same(train(config, str(folder)).state, undisturbed[1].state)
    assert lx.evaluate(folder).metrics["top1"] == undisturbed[1].evals[12]["top1"]


def test_a_run_whose_source_was_a_run_goes_on_without_it(dense, tmp_path):
    """The normalisation of the pixels came from there too."""
    shutil.copytree(dense, tmp_path / "dense")
    whole = train(_config(tmp_path / "dense"), str(tmp_path / "whole"))
    with running.dying_after(6):
        train(_config(tmp_path / "dense"), str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "dense")
    running.assert_same(train(_config(tmp_path / "dense"), str(tmp_path / "run")).state, whole.state)
    assert lx.restore(tmp_path / "run").dataset.mean == (0.25,)


@pytest.mark.parametrize("damage", ["{", "{}", "[]", "another's", "digest"])
def test_a_damaged_record_is_named(undisturbed, file, tmp_path, damage):
    config, folder = _moved(undisturbed, file, tmp_path), tmp_path / "run"
    with running.dying_after(2):
        train(config, str(folder))
    text = (folder / "weights.json").read_text()
    record = {"source": "x", "digest": json.loads(text)["digest"], "experiment": "theirs"}
    changed = {"another's": json.dumps(record), "digest": text.replace('"digest": "', '"digest": "0')}
    (folder / "weights.json").write_text(changed.get(damage, damage))
    with pytest.raises(WorkdirError, match=r"weights.json is damaged: .*|began with other weights"):
        train(config, str(folder))
    (folder / "weights.json").unlink()
    running.assert_same(train(config, str(folder)).state, undisturbed[1].state)
    assert json.loads((folder / "weights.json").read_text())["digest"] == record["digest"]
