"""What training minimises and what evaluation measures, by name.

`softmax` is for classes, one of them right, and takes its loss and its metrics by name; `sigmoid` for classes of which any
number are right; `mse` for numbers.  An objective of your own is "package.module:function":

    def fn(outputs, batch, train):  # -> (loss [batch], {name: metric})

`outputs` is what the model returns, its floating-point arrays as float32.  `batch` holds by name what the data set gives, among
it `image` as the network gets it and `label`, and `weight` `[batch]`: in training what the example counts, in evaluation 0
where a batch is filled up and 1 elsewhere.  A metric is one value per example, `[batch]`, or a pair of such, numerators and
denominators, and what is reported is the sum of the ones over the sum of the others.  What it returns with `train=True` is
logged in training; with `train=False` it may return more.

A loss or a metric of your own for `softmax` has one signature:

    def fn(logits, targets): ...  # float32 [batch, classes], float32 [batch, classes] -> [batch]

Every row of `targets` sums to one: in training after label smoothing, mixup and cutmix; in evaluation it is one-hot.  Where
labels are maps of classes, every place is a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.experiment.best import Best, metric_name
from lowrank_jax.named_code import import_attribute, is_code
from lowrank_jax.text import did_you_mean

PerExample = Callable[[jax.Array, jax.Array], jax.Array]
Metric = jax.Array | tuple[jax.Array, jax.Array]
Measure = Callable[[Any, dict[str, Any], bool], tuple[jax.Array, Mapping[str, Metric]]]

SOFTMAX, SIGMOID, MSE = NAMES = ("softmax", "sigmoid", "mse")


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and metrics.

    Attributes:
      measure: `(outputs, batch, train) -> (loss, metrics)`, per example; of `softmax`, for each of its places if it has many.
      best: the metric that checkpoints are chosen by.
      class_weights: what the loss of each class counts in training; empty if all count 1.
    """

    measure: Measure
    best: Best = Best()
    class_weights: tuple[float, ...] = ()

    def __call__(self, outputs: Any, batch: dict[str, Any], *, train: bool) -> tuple[jax.Array, dict[str, Metric]]:
        """The loss, `[batch]`, and every metric: `[batch]`, or a pair of such.

        Args:
          outputs: of the model.
          batch: `label`, `[batch, ...]`, whatever else the data set gives, and in evaluation `weight`, `[batch]`.
          train: whether it is for training, where `label` may be distributions over classes.
        """
        outputs = jax.tree.map(_to_float32, outputs)
        weights = None
        if train:
            weights = _weights_of(self.class_weights, batch["label"]) if self.class_weights else None
            ones = jnp.ones(len(batch["label"]), jnp.float32)
            batch = {**batch, "weight": ones if weights is None else _mean(weights)}
        # Sums of whole numbers would wrap around, and those of 16 bits lose digits.
        loss, metrics = jax.tree.map(_as_floats, self.measure(outputs, batch, train))
        loss = _mean(loss if weights is None else loss * weights)
        return loss, {name: _per_example(value) for name, value in metrics.items()}


def _to_float32(leaf: Any) -> Any:
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _as_floats(values: Any) -> jax.Array:
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _weights_of(class_weights: tuple[float, ...], labels: jax.Array) -> jax.Array:
    """What each label counts, `[batch, ...]`: classes, or distributions over classes `[batch, ..., classes]`."""
    weights = jnp.asarray(class_weights, jnp.float32)
    return weights[labels] if jnp.issubdtype(labels.dtype, jnp.integer) else labels @ weights


def _mean(values: jax.Array) -> jax.Array:
    """Over all axes but the first."""
    return values if values.ndim < 2 else values.mean(range(1, values.ndim))


def _sum(values: jax.Array) -> jax.Array:
    return values if values.ndim < 2 else values.sum(range(1, values.ndim))


def _per_example(value: Metric) -> Metric:
    """A metric of every place as one of every example."""
    return (_sum(value[0]), _sum(value[1])) if isinstance(value, tuple) else _mean(value)


def make_objective(
    name: str = SOFTMAX,
    loss: str = "softmax_cross_entropy",
    metrics: Sequence[str] = ("top1", "top5"),
    *,
    best: Best | None = None,
    one_class: bool = True,
    class_weights: Sequence[float] = (),
    folder: str | None = None,
) -> Objective:
    """The objective that a config names.

    Args:
      name: one of `NAMES`, or code.
      loss, metrics: of `softmax`; the metrics also of `sigmoid` if a label is one class.
      best: the metric that checkpoints are chosen by; None for the usual one.
      one_class: whether a label is one class, rather than any number of them.
      class_weights: what the loss of each class counts in training.
      folder: where code is looked up besides the installed packages.

    Raises:
      ValueError: there is no such function.
    """
    best = best or Best.usual(name, metrics)
    if name not in NAMES:
        return Objective(find_objective(name, folder), best, tuple(class_weights))
    measured = {metric_name(other): find(other, METRICS, "metric", folder) for other in metrics}
    known: dict[str, Measure] = {
        SOFTMAX: functools.partial(_softmax, find(loss, LOSSES, "loss", folder), measured, best.metric),
        SIGMOID: functools.partial(_one_sigmoid, measured, best.metric) if one_class else _many_sigmoids,
        MSE: _mse,
    }
    return Objective(known[name], best, tuple(class_weights))


def find_objective(name: str, folder: str | None) -> Measure:
    """An objective of the user's.

    Raises:
      ValueError: there is none of that name.
    """
    if not is_code(name):
        raise ValueError(f"unknown objective {name!r}{did_you_mean(name, NAMES)}")
    function: Measure = import_attribute(name, "objective", folder)
    if not callable(function):
        raise ValueError(f"objective {name!r} is not a function")
    return function


def takes_mixed_targets(name: str, folder: str | None) -> bool:
    """Whether an objective takes labels after mixup, cutmix and label smoothing.  One of your own says so by an attribute."""
    return name in NAMES or getattr(find_objective(name, folder), "mixed_targets", False) is True


def _softmax(
    loss: PerExample, metrics: Mapping[str, PerExample], deciding: str, logits: jax.Array, batch: Mapping[str, Any], train: bool
) -> tuple[jax.Array, dict[str, Metric]]:
    label = batch["label"]
    return _at_places(loss, logits, label), {
        name: _at_places(metric, logits, label) for name, metric in _measured(metrics, deciding, train).items()
    }


def _measured(metrics: Mapping[str, PerExample], deciding: str, train: bool) -> Mapping[str, PerExample]:
    """In training the metric that decides; the first one where the loss does."""
    chosen = deciding if deciding in metrics else next(iter(metrics))
    return {chosen: metrics[chosen]} if train else metrics


def _at_places(function: PerExample, logits: jax.Array, targets: jax.Array) -> Any:
    """A function of rows at every place of a map: `[batch, ..., classes] -> [batch, ...]`."""
    if logits.ndim == 2:
        return function(logits, targets)
    places = logits.shape[:-1]
    flat = targets.reshape(-1, *targets.shape[len(places) :])
    return jax.tree.map(lambda values: values.reshape(places), function(logits.reshape(-1, logits.shape[-1]), flat))


def _one_sigmoid(
    metrics: Mapping[str, PerExample], deciding: str, logits: jax.Array, batch: Mapping[str, Any], train: bool
) -> tuple[jax.Array, dict[str, Metric]]:
    """Of labels that are one class, `[batch]`, or distributions, `[batch, classes]`."""
    label = batch["label"]
    targets = label if label.ndim == 2 else jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1), {
        name: metric(logits, label) for name, metric in _measured(metrics, deciding, train).items()
    }


def _many_sigmoids(logits: jax.Array, batch: Mapping[str, Any], train: bool) -> tuple[jax.Array, dict[str, Metric]]:
    """Of labels that say of each class whether it is there, `[batch, ..., classes]`."""
    del train
    label = batch["label"].astype(jnp.float32)
    said, true = logits > 0, label > 0.5
    both = _sum((said & true).astype(jnp.float32))
    either = _sum(said.astype(jnp.float32)) + _sum(true.astype(jnp.float32))
    exact = (said == true).reshape(len(label), -1).all(-1)
    return _mean(optax.sigmoid_binary_cross_entropy(logits, label)), {"f1": (2 * both, either), "exact_match": exact}


def _mse(outputs: jax.Array, batch: Mapping[str, Any], train: bool) -> tuple[jax.Array, dict[str, Metric]]:
    """Of labels that are numbers, `[batch, ...]`; for one number the outputs may be `[batch, 1]`."""
    del train
    error = outputs.reshape(batch["label"].shape) - batch["label"].astype(jnp.float32)
    return _mean(error**2), {"mae": _mean(jnp.abs(error))}


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`[batch]`; targets are distributions `[batch, classes]` or labels `[batch]`."""
    if targets.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return optax.softmax_cross_entropy(logits, targets)


def top1(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Whether the largest logit is that of the label, or of the heaviest class of a distribution, `[batch]`."""
    if targets.ndim == 1:
        return rank_of_label(logits, targets) < 1
    return logits.argmax(-1) == targets.argmax(-1)


def top5(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Whether the label is among the five largest logits, `[batch]`."""
    return rank_of_label(logits, targets if targets.ndim == 1 else targets.argmax(-1)) < 5


def rank_of_label(logits: jax.Array, label: jax.Array) -> jax.Array:
    """How many classes rank above the label, `[batch]`.  Ties go by index, as in argmax; with a NaN the label ranks last."""
    true = jnp.take_along_axis(logits, label[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1])
    ahead = (logits > true) | ((logits == true) & (index < label[:, None]))
    return jnp.where(jnp.isnan(logits).any(-1), logits.shape[-1], ahead.sum(-1))


LOSSES: dict[str, PerExample] = {"softmax_cross_entropy": softmax_cross_entropy}
METRICS: dict[str, PerExample] = {"top1": top1, "top5": top5}

LOWER_IS_BETTER = {"top1": False, "top5": False, "f1": False, "exact_match": False, "mae": True}
"""Of every metric that is measured here, which way is better."""


def find(name: str, known: Mapping[str, PerExample], kind: str, folder: str | None = None) -> PerExample:
    """A loss or a metric of `softmax`.

    Raises:
      ValueError: there is none of that name.
    """
    if name in known:
        return known[name]
    if not is_code(name):
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, known)}")
    function: PerExample = import_attribute(name, kind, folder)
    if not callable(function):
        raise ValueError(f"{kind} {name!r} is not a function")
    return functools.partial(_on_distributions, function)


def _on_distributions(function: PerExample, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """A user's function sees distributions alone."""
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
    return function(logits, targets)


DEFAULT = make_objective()
