"""A run's network against another one's, computed again through `lx.restore`."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

import lowrank_jax as lr
import lowrank_jax.experiment as lx
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.evaluation.against import split_place
from lowrank_jax.experiment.evaluation.evaluator import Evaluator, evaluate_all
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.stored import Opened
from tests import running

SMALL = {"model__kwargs": {"widths": (32, 24), "batch_norm": True}, "dataset__mixup": 0.0, "steps": 20}
EVERY = {"eval__every": "10 steps", "checkpoint__every": "10 steps"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dense run, one of low rank, and one of another rank that keeps an average."""
    folder = tmp_path_factory.mktemp("against")
    train(running.config(**SMALL, **EVERY, lowrank__method="none"), str(folder / "dense"))
    train(running.config(**SMALL, **EVERY, lowrank__method="spectral"), str(folder / "low"))
    train(
        running.config(**SMALL, lowrank__method="spectral", lowrank__scale=0.5, optim__ema_decay=0.9), str(folder / "average")
    )
    return folder


@pytest.fixture(scope="module")
def images():
    return datasets.load(datasets.describe("digits", {}), "test", None).plain(np.arange(360))["image"]


def layers_of(net, images):
    """What the planned layers return, by flax's own means, with factors multiplied out."""
    normal = ((images / 255.0 - net.dataset.mean) / net.dataset.std).astype(np.float32)
    merged = net.merged()
    _, state = merged.model.apply(merged.variables, normal, train=False, capture_intermediates=True, mutable=["intermediates"])
    names = [kernel.name for kernel in net.plan.kernels]
    return {name: np.asarray(state["intermediates"][name.split("/")[0]]["__call__"][0], np.float64) for name in names}


def relative(dense, low):
    return np.linalg.norm(low - dense) / np.linalg.norm(dense)


def assert_compares(found, low, dense, images, names):
    """Against two restored networks."""
    ours, theirs = (net(images).astype(np.float64) for net in (low, dense))
    agreements = ours.argmax(1) == theirs.argmax(1)
    divergences = rel_entr(softmax(theirs, axis=1), softmax(ours, axis=1)).sum(1)
    np.testing.assert_array_equal(found.agreements, agreements)
    np.testing.assert_allclose(found.divergences, divergences, rtol=1e-3, atol=1e-5)
    assert found.agreement == agreements.mean() and found.kl == pytest.approx(divergences.mean(), rel=1e-3)
    assert found.logits_error == pytest.approx(relative(theirs, ours), rel=1e-3)
    outputs, others = layers_of(low, images), layers_of(dense, images)
    assert found.layers == pytest.approx({name: relative(others[name], outputs[name]) for name in names}, rel=1e-3)


def test_it_is_what_restored_networks_say_of_the_same_images(runs, images):
    """Of 360 images the last batch has 40 of 64; on eight devices each has a part."""
    dense, low = lx.restore(runs / "dense", 10), lx.restore(runs / "low")
    found = lx.evaluate(runs / "low", against=f"{runs / 'dense'}@10")
    names = [kernel.name for kernel in low.plan.factored]
    assert len(names) == 3 and 0 < found.fidelity.agreement < 1 and found.fidelity.unseen == {}
    assert_compares(found.fidelity, low, dense, images, names)
    assert found.metrics == lx.evaluate(runs / "low").metrics and found.fidelity.examples == 360
    assert (found.against.workdir, found.against.step) == (str(runs / "dense"), 10)
    fewer = lx.evaluate(runs / "low", split="test[:70]", against=runs / "dense")
    assert_compares(fewer.fidelity, low, lx.restore(runs / "dense"), images[:70], names)


def test_two_runs_of_low_rank_and_averaged_weights(runs, images):
    low, average = lx.restore(runs / "low"), lx.restore(runs / "average")
    names = list(dict.fromkeys(kernel.name for net in (low, average) for kernel in net.plan.factored))
    found = lx.evaluate(runs / "average", against=runs / "low")
    assert_compares(found.fidelity, average, low, images, names)
    averaged, raw = (row.split("  ") for row in str(found).splitlines()[1:3])
    shown = f"{found.fidelity.agreement:.4f}"
    assert shown in averaged and "raw" in raw[0] and len(found.rows()[1]) == len(found.header())
    assert_compares(lx.evaluate(runs / "low", against=runs / "average").fidelity, low, average, images, names)


@pytest.mark.parametrize("begins", ["dense_warmup", "self_guided"])
def test_a_run_is_compared_with_its_own_first_phase(tmp_path, images, begins):
    settings = {f"lowrank__{begins}": "10 steps", "checkpoint__every": "10 steps"}
    settings |= {"lowrank__scale": None, "lowrank__budget": {"params": 0.5}} if begins == "dense_warmup" else {}
    train(running.config(**SMALL, **settings), str(tmp_path / "run"))
    low, first = lx.restore(tmp_path / "run"), lx.restore(tmp_path / "run", 10)
    assert bool(first.plan.factored) == (begins == "self_guided")
    found = lx.evaluate(tmp_path / "run", against=f"{tmp_path / 'run'}@10").fidelity
    assert_compares(found, low, first, images, [kernel.name for kernel in low.plan.factored])


def test_large_batches_are_cut(runs, monkeypatch):
    """So that the outputs of all layers fit; what is measured does not depend on it."""
    whole = lx.evaluate(runs / "low", against=runs / "dense")
    monkeypatch.setattr("lowrank_jax.experiment.evaluation.evaluator._COMPARED", 3)
    evaluator = Evaluator(against=str(runs / "dense"))
    assert evaluator.open(str(runs / "low")).batch_size == 24
    cut = evaluator.evaluate(str(runs / "low"))
    np.testing.assert_allclose(cut.fidelity.divergences, whole.fidelity.divergences, rtol=1e-3, atol=1e-6)
    assert cut.fidelity.layers == pytest.approx(whole.fidelity.layers, rel=1e-4)
    assert cut.metrics == pytest.approx(whole.metrics, rel=1e-5)


@pytest.mark.parametrize("name", ["dense", "low"])
def test_a_run_agrees_with_itself_exactly(runs, name):
    found = lx.evaluate(runs / name, against=runs / name).fidelity
    assert (found.agreement, found.kl, found.logits_error) == (1, 0, 0)
    assert list(found.layers.values()) == [0] * len(found.layers) and bool(found.layers) == (name == "low")


def test_several_runs_are_each_compared_and_programs_shared(runs):
    said, complaints = [], []
    evaluator = Evaluator(against=f"{runs / 'dense'}@best")
    workdirs = [str(runs / name) for name in ("low", "average", "nowhere")]
    done = evaluate_all(workdirs, evaluator, "latest", say=said.append, complain=complaints.append)
    assert "agreement" in said[0].split() and "KL" in said[0].split() and len(complaints) == 1
    best = json.loads((runs / "dense" / "result.json").read_text())["best_step"]
    assert {evaluation.against.step for evaluation in done.values()} == {best}
    assert done[workdirs[0]].fidelity.kl == lx.evaluate(runs / "low", against=f"{runs / 'dense'}@best").fidelity.kl
    assert len(evaluator.reference._watched) == 1  # all have the same kernels
    with pytest.raises(lx.WorkdirError, match="nowhere"):  # said once
        evaluate_all(workdirs, Evaluator(against=str(runs / "nowhere")), "latest", say=said.append, complain=complaints.append)


def test_json_has_all_of_it(runs):
    found = lx.evaluate(runs / "low", against=runs / "dense")
    written = json.loads(found.json())
    assert written["fidelity"] == {
        "against": str(runs / "dense"),
        "step": 20,
        "left_out": "",
        "examples": 360,
        "agreement": found.fidelity.agreement,
        "kl": found.fidelity.kl,
        "logits_error": found.fidelity.logits_error,
        "layers": found.fidelity.layers,
        "unseen": {},
    }
    assert "against" not in written and json.loads(lx.evaluate(runs / "low").json())["fidelity"] is None


def test_the_worst_five_layers_are_shown(runs):
    layers = {f"layer{i}/kernel": i / 10 for i in range(7)}
    found = lx.evaluate(runs / "low", against=runs / "dense")
    fidelity = lr.Fidelity(360, 1.0, 0.0, 0.0, layers, {"odd/\x1bkernel": "why"}, np.ones(360), np.zeros(360))
    changed = lx.Evaluation(**{**vars(found), "fidelity": fidelity})
    lines = str(changed).splitlines()
    start = lines.index(f"against {runs / 'dense'}, step 20:")
    assert [line.split()[0] for line in lines[start + 2 : start + 7]] == [f"layer{i}/kernel" for i in (6, 5, 4, 3, 2)]
    assert lines[start + 7 :] == ["and 2 more, which --json=FILE has", "layers not compared: odd/\\x1bkernel"]


@pytest.fixture
def copies(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "dense@best")
    return tmp_path


def test_a_place_is_a_folder_with_a_step_or_without(runs, copies, monkeypatch):
    monkeypatch.chdir(runs)
    assert split_place("dense") == ("dense", "latest") and split_place("dense@latest") == ("dense", "latest")
    assert split_place("dense@20") == ("dense", "20") and split_place("gs://me@there/dense") == (
        "gs://me@there/dense",
        "latest",
    )
    assert split_place(f"{copies}/dense@best") == (f"{copies}/dense@best", "latest")
    assert split_place(f"{copies}/dense@best@10") == (f"{copies}/dense@best", "10")
    with pytest.raises(lx.ConfigError, match="'bset' is no step; it is latest, best or a number; did you mean best"):
        split_place("dense@bset")
    with pytest.raises(lx.ConfigError, match="names no work directory: DIR@best"):
        split_place("@best")


def test_what_does_not_fit_is_refused_by_name(runs, tmp_path):
    other = {"dataset__name": "synthetic", "dataset__kwargs": {"image_shape": (6, 5, 2), "num_classes": 7}}
    train(running.config(**SMALL, **other, lowrank__method="none"), str(tmp_path / "other"))
    with pytest.raises(lx.ConfigError) as caught:
        lx.evaluate(runs / "low", against=tmp_path / "other")
    low, theirs = runs / "low", tmp_path / "other"
    assert caught.value.problems == [
        f"{low} takes 8x8x1 uint8 inputs; {theirs} takes 6x5x2 uint8 inputs",
        f"{low} gives outputs of shape [10]; {theirs} gives outputs of shape [7]",
    ]
    with pytest.raises(lx.CheckpointError, match="has no step 7"):
        lx.evaluate(runs / "low", against=f"{runs / 'dense'}@7")
    with pytest.raises(lx.UserError, match="against is empty"):
        lx.evaluate(runs / "low", against="")


def test_layers_that_only_one_network_has_or_of_other_sizes_are_left_out_by_name(runs, tmp_path):
    widths = {**SMALL, "model__kwargs": {"widths": (40,), "batch_norm": True}}
    train(running.config(**widths, lowrank__method="none"), str(tmp_path / "other"))
    found = lx.evaluate(runs / "low", against=tmp_path / "other").fidelity
    assert list(found.layers) == ["head/kernel"] and found.layers["head/kernel"] == pytest.approx(found.logits_error)
    assert found.unseen == {
        "dense1/kernel": "its layer's outputs have other shapes in the other network",
        "dense2/kernel": "only one of the networks has a kernel of this name",
    }


def test_other_objectives_have_no_classes_to_agree_on(runs, tmp_path):
    train(running.config(**SMALL, lowrank__method="spectral", objective__name="sigmoid"), str(tmp_path / "sigmoid"))
    found = lx.evaluate(tmp_path / "sigmoid", against=runs / "dense")
    low, dense = (lx.restore(folder)(np.zeros((1, 8, 8, 1), np.uint8)) for folder in (tmp_path / "sigmoid", runs / "dense"))
    assert low.shape == dense.shape
    assert np.isnan(found.fidelity.agreement) and not len(found.fidelity.agreements) and found.fidelity.logits_error > 0
    said = f"{tmp_path / 'sigmoid'} has objective.name=sigmoid, so agreement and KL have no meaning"
    assert said in str(found) and "agreement" not in found.header() and "outputs error" in found.header()
    written = json.loads(found.json())["fidelity"]
    assert (written["kl"], written["agreement"], written["left_out"]) == (None, None, said)


def test_outputs_that_are_no_numbers_are_refused_by_name(runs, monkeypatch):
    def broken(self):
        return jax.tree.map(lambda leaf: leaf * jnp.nan, variables(self))

    variables = Opened.variables
    monkeypatch.setattr(Opened, "variables", broken)
    with pytest.raises(lx.UserError, match=f"^{runs / 'dense'}, step 20: its outputs for some examples are not numbers"):
        lx.evaluate(runs / "low", against=runs / "dense")


def test_a_damaged_checkpoint_of_the_other_run_is_warned_about(runs, copies):
    other = copies / "dense@best"
    for file in (other / "checkpoints" / "20").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.warns(UserWarning, match="dense@best: checkpoint 20 cannot be used"):
        found = lx.evaluate(runs / "low", against=other)
    assert found.against.step == 10
