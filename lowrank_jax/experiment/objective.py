"""What training minimises and what evaluation measures: the loss and the metrics, by name.

A function of your own is given as "package.module:function".  Losses and metrics have one signature:

    def fn(logits, targets): ...  # float32 [batch, classes], float32 [batch, classes] -> [batch]

They return one value per example.  Every row of `targets` sums to one: in training after label smoothing, mixup and cutmix; in
evaluation it is one-hot.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.named_code import import_attribute
from lowrank_jax.text import did_you_mean, first_line

PerExample = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and metrics.

    Attributes:
      loss: called as `loss(logits, targets)`, with targets `[batch, classes]` in training and labels `[batch]` in evaluation.
      metrics: by name, called in the same way.  The first one, of which larger is better, decides which checkpoint is best.
    """

    loss: PerExample
    metrics: Mapping[str, PerExample]

    @property
    def deciding(self) -> str:
        """The name of the metric that checkpoints are chosen by."""
        return next(iter(self.metrics))


def make_objective(loss: str, metrics: Sequence[str]) -> Objective:
    """The functions that a config names.

    Raises:
      ValueError: there is no such function.
    """
    return Objective(_find(loss, LOSSES, "loss"), {metric_name(name): _find(name, METRICS, "metric") for name in metrics})


def metric_name(name: str) -> str:
    """What a metric is called in logs and tables: "package.module:calibration" is "calibration"."""
    return name.rpartition(":")[2]


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
DEFAULT = Objective(softmax_cross_entropy, METRICS)

# What else the logs and results hold under such names.
_TAKEN = ("loss", "count", "examples", "undecodable", "grad_norm", "lr", "images_per_second", "vote")


def _find(name: str, known: Mapping[str, PerExample], kind: str) -> PerExample:
    if name in known:
        return known[name]
    if ":" not in name:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, known)}")
    function: PerExample = import_attribute(name, kind)
    if not callable(function):
        raise ValueError(f"{kind} {name!r} is not a function")
    return functools.partial(_on_distributions, function)


def _on_distributions(function: PerExample, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """A user's function sees distributions alone."""
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
    return function(logits, targets)


def problems(loss: str, metrics: Sequence[str], num_classes: int | None) -> list[str]:
    """What is wrong with the names in a config, or with what the functions return for so many classes; each with its key."""
    found = [] if metrics else ["objective.metrics: empty; checkpoints are chosen by the first metric"]
    names = [metric_name(name) for name in metrics]
    for name in dict.fromkeys(names):
        if name in _TAKEN:
            found.append(f"objective.metrics: {name!r}; the name is taken, call the function something else")
        if names.count(name) > 1:
            found.append(f"objective.metrics: {name!r} is given {names.count(name)} times")
    entries = [("loss", loss, LOSSES), *(("metric", name, METRICS) for name in metrics)]
    for kind, name, known in entries:
        complaint = _complaint(kind, name, known, num_classes)
        if complaint:
            found.append(f"objective.{'loss' if kind == 'loss' else 'metrics'}: {complaint}")
    return found


def _complaint(kind: str, name: str, known: Mapping[str, PerExample], num_classes: int | None) -> str | None:
    try:
        function = _find(name, known, kind)
    except ValueError as error:
        return str(error)
    if name in known or num_classes is None:
        return None
    examples = jax.ShapeDtypeStruct((2, num_classes), jnp.float32)
    try:
        value: Any = jax.eval_shape(function, examples, examples)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's function may raise, SystemExit too
        return f"{name!r} fails on logits [2, {num_classes}] and targets [2, {num_classes}]: {first_line(error)}"
    if getattr(value, "shape", None) != (2,):
        shape = getattr(value, "shape", type(value).__name__)
        return f"{name!r} returns {shape} for a batch of 2; it must return one value per example, [2]"
    if kind == "loss" and not jnp.issubdtype(value.dtype, jnp.floating):
        return f"{name!r} returns {value.dtype}; a loss must return floating-point numbers"
    return None
