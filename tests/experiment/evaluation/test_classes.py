"""What each class is taken for, against scikit-learn's confusion matrix."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import Field
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.evaluation import classes, confusion_picture
from lowrank_jax.experiment.evaluation.classes import Classes
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.evaluation.results import Evaluation, as_json
from lowrank_jax.experiment.hosts.sharding import make_mesh, put_batch, replicated
from lowrank_jax.experiment.training import step
from lowrank_jax.experiment.training.evaluate import evaluate
from lowrank_jax.experiment.training.loop import train
from tests import running

DIGITS = datasets.describe("digits", {})


def counted(true, predicted, size, names=None):
    """What is known of these examples, by scikit-learn."""
    matrix = confusion_matrix(true, predicted, labels=range(size)).astype(np.int32)
    return Classes(names or tuple(f"class {i}" for i in range(size)), matrix.sum(1), matrix)


@pytest.mark.parametrize("size", [2, 3, 40])
def test_every_example_is_counted_once_on_devices_that_share_a_batch(size):
    draw = np.random.default_rng(size)
    logits = draw.integers(0, 4, (256, size)).astype(np.float32)  # with many ties
    labels, mask = draw.integers(0, size, 256).astype(np.int32), draw.integers(0, 2, 256).astype(np.float32)
    mesh = make_mesh()
    placed = put_batch({"logits": logits, "labels": labels, "mask": mask}, mesh)
    assert len(placed["logits"].addressable_shards) == 8
    tally = jax.jit(lambda batch: step.tally(**batch, classes=size), out_shardings=replicated(mesh))(placed)
    seen = mask > 0
    expected = confusion_matrix(labels[seen], logits[seen].argmax(-1), labels=range(size))
    assert tally["confusion"].dtype == jnp.int32
    np.testing.assert_array_equal(tally["confusion"], expected)
    np.testing.assert_array_equal(tally["counts"], np.bincount(labels[seen], minlength=size))


def test_logits_that_are_no_numbers_are_a_mistake_and_in_no_column():
    logits = jnp.array([[jnp.nan, 0.0], [1.0, 0.0], [1.0, jnp.nan]])
    tally = step.tally(logits, jnp.array([0, 0, 1]), jnp.ones(3), 2)
    found = Classes(("a", "b"), np.asarray(tally["counts"]), np.asarray(tally["confusion"]))
    assert found.counts.tolist() == [2, 1] and found.confusion.tolist() == [[1, 0], [0, 0]]
    assert found.top1.tolist() == [0.5, 0.0]


class Undecodable:
    """A split of which every third image cannot be decoded."""

    prefetch = 0
    labels = np.arange(50, dtype=np.int32) % 5
    undecodable = dict.fromkeys(range(0, 50, 3), "lost")

    def __len__(self):
        return 50

    def plain(self, index):
        mask = (index % 3 != 0).astype(np.float32)
        images = ((index[:, None] * 7 + np.arange(5)) % 11).astype(np.float32)
        return {"image": images * mask[:, None], "label": self.labels[index] * mask.astype(np.int32), "mask": mask}


@pytest.mark.parametrize("batch_size", [8, 32, 64])
def test_what_cannot_be_decoded_and_what_fills_a_batch_up_is_not_counted(batch_size):
    def eval_step(variables, batch):
        return {"count": batch["mask"].sum(), "tally": step.tally(batch["image"] * variables, batch["label"], batch["mask"], 5)}

    split, tallies, mesh = Undecodable(), {}, make_mesh()
    weights = {"": jnp.array(1.0), "_raw": jnp.array(-1.0)}
    metrics = evaluate(jax.jit(eval_step), weights, split, batch_size=batch_size, mesh=mesh, tallies=tallies)
    index = np.array([i for i in range(50) if i % 3])
    for name, sign in (("", 1), ("_raw", -1)):
        expected = confusion_matrix(split.labels[index], (sign * split.plain(index)["image"]).argmax(-1), labels=range(5))
        np.testing.assert_array_equal(tallies[name]["confusion"], expected)
        assert tallies[name]["counts"].sum() == metrics[name]["examples"] == 33


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes") / "run"
    small = {"model__kwargs": {"widths": (32,), "batch_norm": True}, "lowrank__method": "spectral", "dataset__mixup": 0.0}
    train(running.config(**small, optim__ema_decay=0.9), str(folder))
    return folder


@pytest.fixture(scope="module")
def evaluation(trained):
    return Evaluator(classes=True).evaluate(str(trained))


def test_averaged_and_raw_weights_are_counted_as_scikit_learn_counts_them(trained, evaluation):
    from lowrank_jax.experiment.evaluation.trained import restore

    examples = datasets.load(DIGITS, "test", None).plain(np.arange(360))
    for raw, found, metrics in (
        (False, evaluation.classes, evaluation.metrics),
        (True, evaluation.raw_classes, evaluation.raw_metrics),
    ):
        predicted = restore(str(trained), raw=raw)(examples["image"]).argmax(-1)
        np.testing.assert_array_equal(found.confusion, confusion_matrix(examples["label"], predicted))
        assert found.confusion.diagonal().sum() / 360 == metrics["top1"] and found.counts.sum() == 360
    assert (evaluation.classes.confusion != evaluation.raw_classes.confusion).any()
    assert evaluation.classes.names == tuple("0123456789")


def test_nothing_is_counted_unless_it_is_asked_for(trained):
    found = Evaluator(split="test[:100]").evaluate(str(trained))
    assert found.classes is None and found.counted() == {} and found.record()["classes"] is None


def test_json_holds_both_matrices_each_row_on_a_line(evaluation):
    text = evaluation.json()
    record = json.loads(text)
    assert record["metrics"] == evaluation.metrics and record["split"] == "test"
    for kind in ("classes", "raw_classes"):
        found = getattr(evaluation, kind)
        assert record[kind]["confusion"] == found.confusion.tolist() and record[kind]["counts"] == found.counts.tolist()
        assert record[kind]["names"] == list("0123456789") and record[kind]["top1"] == pytest.approx(found.top1)
    assert f"[ {', '.join(map(str, evaluation.classes.confusion[0]))} ]" in text


@pytest.mark.parametrize(
    "value", [{"a": "[ 1,\n  2 ]  [", "b": [1.5, None, True], "c": [[1, 2], []], "d": [{"e": [1]}]}, [], {}]
)
def test_json_is_what_it_was(value):
    assert json.loads(as_json(value)) == value


def test_classes_without_examples_have_no_top1():
    found = counted([0, 0, 1], [0, 1, 1], 3)
    assert np.isnan(found.top1[2]) and found.top1[:2].tolist() == [0.5, 1.0]
    assert found.record()["top1"] == [0.5, 1.0, None]
    assert found.table().splitlines()[3].split() == ["class", "2", "0"]


def test_few_classes_are_all_in_the_table_and_of_many_the_worst_with_the_most_frequent_mistakes():
    few = counted([0, 0, 0, 1, 2], [1, 1, 2, 1, 2], 3, ("ant", "b\x1b[2J", "cat"))
    assert [line.split() for line in few.table().splitlines()[1:]] == [
        ["ant", "3", "0.0000", "b\\x1b[2J", "(2)"],
        ["b\\x1b[2J", "1", "1.0000"],
        ["cat", "1", "1.0000"],
    ]
    true = np.repeat(np.arange(60), 10)
    predicted = true.copy()
    predicted[10 * 7 : 10 * 7 + 4] = 3
    predicted[10 * 9 : 10 * 9 + 6] = 4
    many = counted(true, predicted, 60)
    assert many.confused() == [(9, 4, 6), (7, 3, 4)]
    lines = many.table().splitlines()
    assert lines[0] == "the 20 worst of 60 classes:" and len(lines) == 1 + 21 + 1 + 3
    assert [line.split()[1] for line in lines[2:4]] == ["9", "7"] and lines[-2].split()[-1] == "6"


@pytest.mark.parametrize("size", [3, 60])
def test_the_picture_has_a_panel_for_each_set_of_weights_whatever_the_names(size, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # of a matplotlibrc
    draw = np.random.default_rng(0)
    true, predicted = draw.integers(0, size, (2, 500))
    found = counted(true, predicted, size, tuple(f"_$\\frac{{{i}$ 犬 \x1b" + "long " * 9 for i in range(size)))
    panels = {"averaged": found, "raw": found} if size == 3 else {"test": found}
    picture = Image.open(io.BytesIO(confusion_picture.draw(panels, ".PNG")))
    assert picture.format == "PNG" and (picture.width > picture.height) == (size == 3)
    assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_classes": None}, "the label of an example is not one class, so classes cannot be counted"),
        ({"label": Field((8, 8), "int32")}, "the label of an example is not one class, so classes cannot be counted"),
        ({"num_classes": 21_841}, "a confusion matrix of 21,841 classes is too large; at most 10,000"),
    ],
)
def test_what_has_no_classes_to_count_is_refused_by_name(changes, reason):
    dataset = dataclasses.replace(DIGITS, class_names=(), **changes)
    assert classes.number_to_count(running.config(), dataset) == 0
    with pytest.raises(UserError, match=f"digits: {reason}"):
        classes.check(running.config(), dataset)


def test_classes_without_names_are_called_by_their_numbers():
    assert classes.names_of(dataclasses.replace(DIGITS, class_names=(), num_classes=3)) == ("0", "1", "2")


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "digits"])
def test_the_names_of_known_classes_are_as_many(name):
    dataset = datasets.describe(name, {})
    assert len(set(dataset.class_names)) == dataset.num_classes


def test_an_evaluation_is_shown_as_its_table():
    found = Evaluation("test", 1, {"top1": 0.5, "loss": 1.0, "examples": 2}, None, 1, 1, {})
    assert str(found) == found.table()


@pytest.mark.slow
def test_several_processes_count_what_one_counts(trained, evaluation, tmp_path):
    arguments = [sys.executable, "-m", "lowrank_jax", "evaluate", f"--workdir={trained}", f"--json={tmp_path / 'out.json'}"]
    said = running.wait_all(processes := running.start_all(arguments, 2))
    assert [process.returncode for process in processes] == [0, 0], said
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["classes"] == json.loads(evaluation.json())["classes"]
    assert record["raw_classes"] == json.loads(evaluation.json())["raw_classes"]
