"""Objectives besides softmax on one class: maps, numbers, many classes, several heads; each against numpy."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.best import Best
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import Dataset, Field, Source
from lowrank_jax.experiment.frozen import FrozenDict
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.objective import LOWER_IS_BETTER, METRICS, make_objective
from lowrank_jax.experiment.report import stored_runs
from lowrank_jax.experiment.sweep.trials import merit
from lowrank_jax.experiment.training.build import build
from lowrank_jax.experiment.training.class_weights import balanced, with_class_weights
from lowrank_jax.experiment.training.evaluate import evaluate
from lowrank_jax.experiment.training.log_window import Diverged
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.phases import phases_of
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running

SIZES = {"train": 48, "test": 37}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A split that is drawn at random from its size."""

    dataset: Dataset
    size: int
    prefetch = 0
    undecodable = FrozenDict()

    def __len__(self):
        return self.size

    def all_labels(self):
        return self.plain(np.arange(self.size))["label"]

    def augmented(self, index, bits, augmentation):
        return {name: array for name, array in self.plain(index).items() if name != "mask"}

    def plain(self, index):
        rng = np.random.default_rng(self.size)
        found = {}
        for name, field in self.dataset.fields.items():
            shape = (self.size, *field.shape)
            if field.dtype == "float32":
                found[name] = rng.normal(size=shape).astype(np.float32)
            else:
                high = 256 if name == "image" else self.dataset.num_classes or 2
                found[name] = (high * rng.random(shape) ** 2).astype(field.dtype)  # the first classes are frequent
        return {**{name: array[index] for name, array in found.items()}, "mask": np.ones(len(index), np.float32)}


ONE_CLASS = Field((), "int32")


def described(name, image=(4, 4, 1), label=ONE_CLASS, num_classes=None, **more):
    channels = image[-1]
    return Dataset(name, image, num_classes, SIZES, (0.5,) * channels, (0.25,) * channels, label=label, **more)


KINDS = {
    "classes": described("classes", num_classes=3),
    "maps": described("maps", label=Field((4, 4), "int32"), num_classes=3),
    "numbers": described("numbers", (6,), Field((2,), "float32"), image_dtype="float32"),
    "number": described("number", (6,), Field((), "float32"), image_dtype="float32"),
    "tags": described("tags", label=Field((5,), "float32")),
    "boxes": described("boxes", label=Field((), "int32"), num_classes=3, extras={"box": Field((4,), "float32")}),
}


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """The data sets by name."""
    for name, dataset in KINDS.items():
        made = Source(lambda *given, dataset=dataset: dataset, lambda dataset, split, folder: Drawn(dataset, SIZES[split]))
        monkeypatch.setitem(datasets.DATASETS, name, made)


class Flat(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_outputs)(x.reshape(len(x), -1))


class PerPixel(nn.Module):
    """A logit a class at every pixel, as a U-Net gives them."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Conv(self.num_classes, (3, 3))(x)


class Heads(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        return {"class": nn.Dense(self.features)(x), "box": nn.Dense(4)(x)}


def top1(logits, targets):
    """Somebody's own."""
    return logits.sum(-1)


def located(outputs, batch, train):
    """Right class, and the error of the box where the class is 0."""
    error = ((outputs["box"] - batch["box"]) ** 2).mean(-1)
    first = (batch["label"] == 0).astype(jnp.float32)
    log_p = jax.nn.log_softmax(outputs["class"])
    loss = error - jnp.take_along_axis(log_p, batch["label"][:, None], -1)[:, 0]
    return loss, {"right": outputs["class"].argmax(-1) == batch["label"], "first_error": (error * first, first)}


def soft(outputs, batch, train):
    assert batch["label"].ndim == (2 if train else 1)
    return (outputs**2).mean(-1), {}


soft.mixed_targets = True  # pyright: ignore[reportFunctionMemberAccess]

MODELS = {"maps": "PerPixel", "boxes": "Heads"}
OBJECTIVES = {
    "classes": "softmax", "maps": "softmax", "numbers": "mse", "number": "mse", "tags": "sigmoid",
    "boxes": f"{__name__}:located",
}  # fmt: skip


def config(kind, **changes):
    settings = {
        "dataset__name": kind, "model__name": f"{__name__}:{MODELS.get(kind, 'Flat')}", "model__kwargs": {},
        "objective__name": OBJECTIVES[kind], "lowrank__method": "none", "batch_size": 16, "steps": 4, "eval__batch_size": 16,
        "dataset__mixup": 0.0, "dataset__crop_padding": 0, "dataset__flip": False, "optim__warmup": "0 steps",
        "log__every": "2 steps",
    }  # fmt: skip
    return running.config(**{**settings, **changes})


def refused(kind, **changes):
    with pytest.raises(configs.ConfigError) as caught:
        config(kind, **changes)
    return caught.value.problems


def by_numpy(kind, experiment, variables):
    """Loss and metrics over the whole test split, in float64."""
    examples = Drawn(KINDS[kind], SIZES["test"]).plain(np.arange(SIZES["test"]))
    image, label = examples["image"].astype(np.float64), examples["label"]
    image = ((image / 255 if examples["image"].dtype == np.uint8 else image) - 0.5) / 0.25
    outputs = jax.device_get(experiment.network.apply(variables, jnp.asarray(image, jnp.float32), train=False))
    outputs = jax.tree.map(lambda leaf: leaf.astype(np.float64), outputs)
    if kind in ("numbers", "number"):
        error = outputs.reshape(label.shape) - label
        return {"loss": (error**2).mean(), "mae": np.abs(error).mean()}
    if kind == "tags":
        p, said, true = 1 / (1 + np.exp(-outputs)), outputs > 0, label > 0.5
        loss = -(label * np.log(p) + (1 - label) * np.log(1 - p)).mean()
        f1 = 2 * (said & true).sum() / (said.sum() + true.sum())
        return {"loss": loss, "f1": f1, "exact_match": (said == true).all(-1).mean()}
    logits = outputs["class"] if kind == "boxes" else outputs
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(log_p, label[..., None], -1)[..., 0]
    right = (logits.argmax(-1) == label).mean()
    if kind == "boxes":
        error = ((outputs["box"] - examples["box"]) ** 2).mean(-1)
        return {"loss": (error - own).mean(), "right": right, "first_error": error[label == 0].mean()}
    return {"loss": -own.mean(), "top1": right, "top5": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_every_batch_size_evaluates_to_the_same_exact_numbers(kind):
    experiment = build(config(kind, optim__accumulate=2))
    split = {name: Drawn(KINDS[kind], size) for name, size in SIZES.items()}
    batch = experiment_batch(experiment, split["train"], 16)
    state, metrics = experiment.compile_train_step()(experiment.init(), batch)
    assert all(np.isfinite(value) for value in metrics.values())
    variables = state.variables()
    eval_step = experiment.jit_eval_step()
    found = [evaluate(eval_step, variables, split["test"], batch_size=size, mesh=experiment.mesh)[""] for size in (8, 16, 40)]
    expected = {**by_numpy(kind, experiment, jax.device_get(variables[""])), "examples": SIZES["test"]}
    for each in found:
        assert each == pytest.approx(expected, rel=2e-5)


def experiment_batch(experiment, split, size):
    return put_batch({name: array for name, array in split.plain(np.arange(size)).items() if name != "mask"}, experiment.mesh)


def test_the_metric_of_a_batch_in_training_is_the_ratio_of_its_sums():
    experiment = build(config("boxes", optim__accumulate=2))
    state = experiment.init()
    variables = jax.device_get(state.variables()[""])
    batch = Drawn(KINDS["boxes"], SIZES["train"]).plain(np.arange(16))
    image = ((batch["image"] / 255 - 0.5) / 0.25).astype(np.float32)
    outputs = experiment.network.apply(variables, image, train=False)
    error = ((np.asarray(outputs["box"]) - batch["box"]) ** 2).mean(-1)
    _, metrics = experiment.compile_train_step()(state, experiment_batch(experiment, Drawn(KINDS["boxes"], 48), 16))
    assert metrics["first_error"] == pytest.approx(error[batch["label"] == 0].mean(), rel=1e-5)


def test_a_run_is_judged_by_what_it_names(tmp_path):
    settings = {"eval__best": "-first_error", "eval__every": "1 step", "steps": 3, "checkpoint__every": "100 steps"}
    run = train(config("boxes", **settings), str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best_step"] == min(run.evals, key=lambda step: (run.evals[step]["first_error"], -step))
    assert run.train[3].keys() >= {"train/loss", "train/right", "train/first_error"}


def nobody(outputs, batch, train):
    nothing = jnp.zeros(len(outputs))
    return outputs.mean(-1), {"of_nobody": (nothing, nothing), "no_number": jnp.log(nothing - 1)}


def test_a_metric_that_counts_nobody_is_never_best_and_no_divergence(tmp_path):
    settings = {"objective__name": f"{__name__}:nobody", "eval__every": "2 steps"}
    trained = config("classes", eval__best="of_nobody", **settings)
    run = train(trained, str(tmp_path / "nobody"))
    result = json.loads((tmp_path / "nobody" / "result.json").read_text())
    assert np.isnan(run.evals[4]["of_nobody"]) and result["eval"]["of_nobody"] is None and result["best_step"] is None
    assert Workdir(tmp_path / "nobody").metrics.evaluations("of_nobody") == []
    assert merit([{"valid": result["eval"]}], [1], trained.best) < merit(
        [{"valid": {"of_nobody": -1e9, "loss": 1e9}}], [0], trained.best
    )
    stored = stored_runs.read(tmp_path / "nobody", "nobody")
    assert stored.done and np.isnan(stored.figure("eval/of_nobody"))
    with pytest.raises(Diverged, match="the evaluated no_number is nan at step 2"):
        train(config("classes", eval__best="no_number", **settings), str(tmp_path / "diverged"))


def test_the_usual_metric_is_the_first_one_of_softmax_and_the_loss_of_others():
    assert config("classes").best == Best("top1") and config("classes", objective__metrics=("top5",)).best == Best("top5")
    assert config("numbers").best == config("boxes").best == Best("loss", lower=True)
    stored = {"objective.name": "mse", "objective.metrics": ["top1", "top5"]}
    assert Best.of(stored) == Best("loss", lower=True) and Best.of({**stored, "eval.best": "mae"}) == Best("mae")
    assert Best.of({"objective.metrics": ["a.b:c"]}) == Best("c")


def test_of_every_metric_that_is_measured_here_it_is_known_which_way_is_better():
    own = [make_objective(name, one_class=False) for name in ("sigmoid", "mse")]
    zeros = jnp.zeros((2, 5))
    measured = {*METRICS, *(metric for each in own for metric in each(zeros, {"label": zeros}, train=True)[1])}
    assert measured == {*LOWER_IS_BETTER}
    assert config("classes", objective__metrics=(f"{__name__}:top1",), eval__best="-top1").best == Best("top1", lower=True)


def test_class_weights_weigh_the_loss_of_training_alone():
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    label = np.array([0, 1, 2, 0, 0, 1])
    one_hot = np.eye(3, dtype=np.float32)[label]
    mixed = 0.7 * one_hot + 0.3 * one_hot[::-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    objective = make_objective(class_weights=(1.0, 2.0, 4.0))
    for targets in (label, one_hot, mixed):
        rows = np.eye(3)[targets] if targets.ndim == 1 else targets
        loss, _ = objective(logits, {"label": jnp.asarray(targets)}, train=True)
        np.testing.assert_allclose(loss, (rows @ [1, 2, 4]) * -(rows * log_p).sum(-1), rtol=1e-5)
    evaluated, _ = objective(logits, {"label": jnp.asarray(label), "weight": jnp.ones(6)}, train=False)
    np.testing.assert_allclose(evaluated, -log_p[np.arange(6), label], rtol=1e-5)
    maps, _ = objective(logits.reshape(2, 3, 3), {"label": jnp.asarray(label.reshape(2, 3))}, train=True)
    np.testing.assert_allclose(maps, (-log_p[np.arange(6), label] * [1, 2, 4, 1, 1, 2]).reshape(2, 3).mean(-1), rtol=1e-5)


def test_balanced_classes_count_the_same_and_an_example_counts_one_on_average():
    counts = np.array([30, 10, 5])
    weights = np.array(balanced(counts))
    np.testing.assert_allclose(weights * counts, 15)
    with pytest.raises(configs.ConfigError, match="class 1 does not occur"):
        balanced(np.array([3, 0]))
    split = Drawn(KINDS["maps"], SIZES["train"])
    experiment = with_class_weights(phases_of(config("maps", objective__class_weights="balanced")), split).last
    labels = split.plain(np.arange(len(split)))["label"]
    assert experiment.class_weights == balanced(np.bincount(labels.ravel(), minlength=3))
    assert experiment.objective.class_weights == experiment.class_weights


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("numbers", {"objective__name": "softmax"}, "objective.name: 'softmax'; the labels of numbers are no classes"),
        ("number", {"objective__name": "sigmoid"}, "objective.name: 'sigmoid'; the labels of number are no classes"),
        ("classes", {"objective__name": "sofmax"}, "objective.name: 'sofmax'; unknown; did you mean softmax?"),
        (
            "numbers",
            {"objective__metrics": ("top1",)},
            "objective.metrics: ('top1',); objective.name 'mse' has metrics of its own",
        ),
        ("numbers", {"objective__loss": "a:b"}, "objective.loss: 'a:b'; only softmax takes a loss by name"),
        ("numbers", {"objective__class_weights": (1.0, 2.0)}, "objective.class_weights: (1.0, 2.0); for 'mse' the label"),
        ("classes", {"objective__class_weights": (1.0, 2.0)}, "objective.class_weights: 2 numbers; classes has 3 classes"),
        (
            "classes",
            {"objective__class_weights": (1.0, -2.0, 1.0)},
            "objective.class_weights: (1.0, -2.0, 1.0); every one must",
        ),
        (
            "classes",
            {"objective__class_weights": "balance"},
            "objective.class_weights: 'balance'; must be numbers, or \"balanced\"",
        ),
        (
            "classes",
            {"objective__class_weights": 3},
            "objective.class_weights: 3; must be a sequence, such as (1, 2), or a string",
        ),
        ("classes", {"objective__name": f"{__name__}:located", "dataset__mixup": 0.2}, "dataset.mixup: 0.2; objective "),
        (
            "boxes",
            {"objective__name": "softmax", "model__name": f"{__name__}:Flat", "dataset__cutmix": 1.0},
            "leave box of boxes",
        ),
        ("maps", {"dataset__cutmix": 1.0}, "dataset.cutmix: 1; it would cut images and leave their labels whole"),
        ("tags", {"optim__label_smoothing": 0.1}, "optim.label_smoothing: 0.1; the label of an example of tags is no class"),
        ("numbers", {"eval__best": "mea"}, "eval.best: 'mea' is not measured; measured are loss, mae; did you mean mae?"),
        ("numbers", {"eval__best": "loss"}, "eval.best: 'loss'; of a loss lower is better: \"-loss\""),
        ("numbers", {"eval__best": "mae"}, "eval.best: 'mae'; of mae lower is better: \"-mae\""),
        ("classes", {"eval__best": "-top5"}, "eval.best: '-top5'; of top5 higher is better: \"top5\""),
        ("tags", {"eval__best": "-f1"}, "eval.best: '-f1'; of f1 higher is better: \"f1\""),
        ("numbers", {"eval__best": "a b"}, "eval.best: 'a b'; must be the name of a metric"),
        ("maps", {"model__name": f"{__name__}:Flat"}, "returns shape (2, 3) for a batch of two; expected logits [2, 4, 4, 3]"),
        ("number", {"model__name": f"{__name__}:Heads"}, "returns dict for a batch of two; expected outputs [2, 1]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, changes, message):
    [problem] = refused(kind, **changes)
    assert message in problem


def no_pair(outputs, batch, train):
    return outputs.mean(-1)


def whole_batch(outputs, batch, train):
    return outputs.mean(-1), {"x": outputs.mean()}


def spaced(outputs, batch, train):
    return outputs.mean(-1), {"a b": outputs.mean(-1)}


def taken(outputs, batch, train):
    return outputs.mean(-1), {"lr": outputs.mean(-1)}


def whole_loss(outputs, batch, train):
    return outputs.mean(), {}


def raises(outputs, batch, train):
    if not train:
        raise KeyError("nothing in evaluation")
    return outputs.mean(-1), {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_pair", "in training; it must return (loss, {name: metric})"),
        (
            "whole_batch",
            "metric 'x' of '{module}:whole_batch' is () for a batch of 2; it must return one value per example, [2]",
        ),
        ("spaced", "returns a metric 'a b'; a name begins with a letter, and has no spaces or slashes"),
        ("taken", "returns a metric 'lr'; the name is taken"),
        ("whole_loss", "returns () for a batch of 2; it must return one value per example, [2]"),
        ("raises", "fails in evaluation on outputs [2, 3]: 'nothing in evaluation'"),
        ("missing", "cannot be imported"),
    ],
)
def test_a_function_that_would_fail_later_is_refused_before(name, message):
    [problem] = refused("classes", objective__name=f"{__name__}:{name}")
    assert problem.startswith("objective.name: ") and message.replace("{module}", __name__) in problem


def test_one_that_says_so_gets_mixed_labels_in_training():
    assert config("classes", objective__name=f"{__name__}:soft", dataset__mixup=0.2).target_classes == 3
