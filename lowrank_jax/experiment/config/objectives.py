"""Whether an objective fits the data set, and what the network gives."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.experiment.best import LOSS, NAME, TAKEN, metric_name
from lowrank_jax.experiment.config.schema import BALANCED, Config, ObjectiveConfig
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.objective import (
    LOSSES,
    LOWER_IS_BETTER,
    METRICS,
    MSE,
    NAMES,
    SIGMOID,
    SOFTMAX,
    Measure,
    PerExample,
    find,
    find_objective,
    takes_mixed_targets,
)
from lowrank_jax.text import did_you_mean, first_line, shown

_BATCH = 2  # examples that an objective is tried on


def problems(config: Config, dataset: Dataset | None) -> list[str]:
    """What is wrong with the objective's settings by themselves, and on a data set if it is known; each with its key."""
    found = _name_problems(config, dataset)
    return found + (_label_problems(config, dataset) if dataset and not found else [])


def _name_problems(config: Config, dataset: Dataset | None) -> list[str]:
    given, usual = config.objective, ObjectiveConfig()
    found = []
    by_name = given.name == SOFTMAX or (given.name == SIGMOID and (dataset is None or config.one_class))
    if given.name not in NAMES:
        try:
            find_objective(given.name, config.code_dir)
        except ValueError as error:
            found.append(f"objective.name: {error}")
    if given.name != SOFTMAX and given.loss != usual.loss:
        found.append(f"objective.loss: {given.loss!r}; only {SOFTMAX} takes a loss by name, objective.name is {given.name!r}")
    if not by_name and given.metrics != usual.metrics:
        found.append(f"objective.metrics: {given.metrics}; objective.name {given.name!r} has metrics of its own")
    if by_name:
        found += _metric_problems(given.metrics)
        classes = dataset.num_classes if dataset else None
        entries = [("loss", given.loss, LOSSES), *(("metrics", name, METRICS) for name in given.metrics)]
        complaints = [(key, _complaint(name, known, key, classes, config.code_dir)) for key, name, known in entries]
        found += [f"objective.{key}: {complaint}" for key, complaint in complaints if complaint]
    return found


def _metric_problems(metrics: Sequence[str]) -> list[str]:
    """What is wrong with the names of metrics."""
    found = [] if metrics else ["objective.metrics: empty; checkpoints are chosen by the first metric"]
    names = [metric_name(name) for name in metrics]
    for name in dict.fromkeys(names):
        if name in TAKEN:
            found.append(f"objective.metrics: {name!r}; the name is taken, call the function something else")
        if names.count(name) > 1:
            found.append(f"objective.metrics: {name!r} is given {names.count(name)} times")
    return found


def _complaint(name: str, known: Mapping[str, PerExample], key: str, classes: int | None, folder: str | None) -> str | None:
    """What is wrong with a loss or a metric of rows of logits."""
    try:
        function = find(name, known, "loss" if key == "loss" else "metric", folder)
    except ValueError as error:
        return str(error)
    if name in known or classes is None:
        return None
    rows = jax.ShapeDtypeStruct((_BATCH, classes), jnp.float32)
    try:
        value: Any = jax.eval_shape(function, rows, rows)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's function may raise, SystemExit too
        return f"{name!r} fails on logits [2, {classes}] and targets [2, {classes}]: {first_line(error)}"
    return _loss_complaint(repr(name), value) if key == "loss" else _metric_complaint(repr(name), value)


def _metric_complaint(name: str, value: Any) -> str | None:
    parts = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return next(filter(None, (_example_complaint(name, part) for part in parts)), None)


def _example_complaint(name: str, value: Any) -> str | None:
    if getattr(value, "shape", None) == (_BATCH,):
        return None
    shape = getattr(value, "shape", type(value).__name__)
    return f"{name} returns {shape} for a batch of 2; it must return one value per example, [2]"


def _loss_complaint(name: str, value: Any) -> str | None:
    if complaint := _example_complaint(name, value):
        return complaint
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"{name} returns {value.dtype}; a loss must return floating-point numbers"
    return None


def _label_problems(config: Config, dataset: Dataset) -> list[str]:
    """Labels that the objective does not take, and settings that do not suit these labels."""
    name, label, whole = config.objective.name, dataset.label, _is_whole(dataset)
    classes = dataset.num_classes is not None and whole
    if name == SOFTMAX and not classes:
        return [f"objective.name: {name!r}; the labels of {dataset.name} are no classes; use mse, or one of your own"]
    if name == SIGMOID and not label.shape and not classes:
        return [f"objective.name: {name!r}; the labels of {dataset.name} are no classes; use mse, or one of your own"]
    found = _class_weight_problems(config, dataset, classes)
    if config.mixes:
        found += _mixing_problems(config, dataset)
    taken = [name for name in dataset.extras if name in ("image", "label", "weight", "mask", "place")]
    return found + [f"dataset.name: {dataset.name} has a field {name!r}, which is taken" for name in taken]


def _is_whole(dataset: Dataset) -> bool:
    return jnp.issubdtype(jnp.dtype(dataset.label.dtype), jnp.integer)


def _class_weight_problems(config: Config, dataset: Dataset, classes: bool) -> list[str]:
    weights, name = config.objective.class_weights, config.objective.name
    if not weights:
        return []
    if name == MSE or not classes or (name != SOFTMAX and dataset.label.shape):
        return [
            f"objective.class_weights: {shown(weights)}; for {name!r} the label of an example of {dataset.name} is no class"
        ]
    if weights != BALANCED and len(weights) != dataset.num_classes:
        return [f"objective.class_weights: {len(weights)} numbers; {dataset.name} has {dataset.num_classes} classes"]
    return []


def _mixing_problems(config: Config, dataset: Dataset) -> list[str]:
    """Where labels cannot be mixed."""
    data, name, label = config.dataset, config.objective.name, dataset.label
    given = {"dataset.mixup": data.mixup, "dataset.cutmix": data.cutmix, "optim.label_smoothing": config.optim.label_smoothing}
    given = {key: value for key, value in given.items() if value}
    reasons: dict[str, str] = {}
    if not takes_mixed_targets(name, config.code_dir):
        hint = "if it does, set its attribute mixed_targets = True"
        reasons = dict.fromkeys(given, f"objective {name!r} does not say that it takes mixed labels; {hint}")
    elif config.target_classes is None:
        reasons["optim.label_smoothing"] = f"the label of an example of {dataset.name} is no class"
        if dataset.num_classes is not None and name not in (MSE, SIGMOID):
            reasons |= dict.fromkeys(given, f"the label of an example of {dataset.name} is no class")
    if len(label.shape) > 1:
        reasons.setdefault("dataset.cutmix", "it would cut images and leave their labels whole")
    if dataset.extras:
        more = ", ".join(dataset.extras)
        reasons |= dict.fromkeys(("dataset.mixup", "dataset.cutmix"), f"it would leave {more} of {dataset.name} unmixed")
    return [f"{key}: {value:g}; {reasons[key]}" for key, value in given.items() if key in reasons]


def batch_like(config: Config, dataset: Dataset, *, train: bool, size: int = _BATCH) -> dict[str, jax.ShapeDtypeStruct]:
    """What the objective is given with the outputs of a batch: images as the network gets them, and labels after mixing."""
    fields = {name: jax.ShapeDtypeStruct((size, *field.shape), field.dtype) for name, field in dataset.fields.items()}
    fields["image"] = jax.ShapeDtypeStruct(fields["image"].shape, jnp.float32)
    label = fields["label"]
    if train and (classes := config.target_classes) is not None:
        fields["label"] = jax.ShapeDtypeStruct((*label.shape, classes), jnp.float32)
    elif train and config.mixes:
        fields["label"] = jax.ShapeDtypeStruct(label.shape, jnp.float32)
    return fields if train else {**fields, "weight": jax.ShapeDtypeStruct((size,), jnp.float32)}


def output_problems(config: Config, training: Any, evaluated: Any) -> list[str]:
    """Whether the objective takes what the network gives for a batch of two in training and in evaluation, as shapes."""
    for outputs in (training, evaluated):
        if complaint := _output_complaint(config, outputs):
            return [f"model: {complaint}"]
    if config.objective.name in NAMES:
        names = dict.fromkeys(_measured(config, evaluated, train=False)[1])
        return _best_problems(config, list(names))
    return _own_problems(config, training, evaluated)


def _output_complaint(config: Config, outputs: Any) -> str | None:
    """What is wrong with the outputs for an objective that is known by name."""
    dataset, objective, model = config.description, config.objective.name, config.model.name
    if objective not in NAMES:
        return None
    found = list(outputs.shape) if hasattr(outputs, "shape") else type(outputs).__name__
    expected, what = _expected(config, dataset), "outputs" if objective == MSE else "logits"
    if found not in expected:
        if objective != MSE and isinstance(found, list) and found[:-1] == expected[0][:-1]:
            return f"{model} returns {found[-1]} logits; {dataset.name} has {expected[0][-1]} classes"
        found = f"shape {tuple(found)}" if isinstance(found, list) else found
        return f"{model} returns {found} for a batch of two; expected {what} {expected[0]}"
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        return f"{model} returns {outputs.dtype}; {what} must be floating-point numbers"
    return None


def _expected(config: Config, dataset: Dataset) -> list[list[int]]:
    """The shapes that outputs may have."""
    labels = [_BATCH, *dataset.label.shape]
    if config.objective.name == MSE:
        return [labels] if dataset.label.shape else [[_BATCH, 1], [_BATCH]]
    if config.objective.name == SIGMOID and not config.one_class:
        return [labels]
    return [[*labels, dataset.num_classes or 1]]


def _measured(config: Config, outputs: Any, *, train: bool) -> tuple[Any, dict[str, Any]]:
    """What the objective gives for these outputs, as shapes."""
    objective, batch = config.build_objective(), batch_like(config, config.description, train=train)
    return jax.eval_shape(lambda outputs, batch: objective(outputs, batch, train=train), outputs, batch)


def _own_problems(config: Config, training: Any, evaluated: Any) -> list[str]:
    """What is wrong with a function of the user's, tried on a batch of two in training and in evaluation."""
    name, key, metrics = config.objective.name, "objective.name", {}
    for when, outputs in (("training", training), ("evaluation", evaluated)):
        train = when == "training"
        measure = find_objective(name, config.code_dir)
        batch = batch_like(config, config.description, train=train)
        batch = {**batch, "weight": jax.ShapeDtypeStruct((_BATCH,), jnp.float32)}
        outputs = jax.tree.map(_as_float32, outputs)
        try:
            value: Any = jax.eval_shape(functools.partial(_with_train, measure, train), outputs, batch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever somebody's function may raise, SystemExit too
            return [f"{key}: {name!r} fails in {when} on {_shapes(outputs)}: {first_line(error)}"]
        if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[1], Mapping):
            return [f"{key}: {name!r} returns {_kind(value)} in {when}; it must return (loss, {{name: metric}})"]
        loss, metrics = value
        complaint = _loss_complaint(repr(name), loss) or _metrics_complaint(name, metrics)
        if complaint:
            return [f"{key}: {complaint}"]
    return _best_problems(config, list(metrics))


def _with_train(measure: Measure, train: bool, outputs: Any, batch: Any) -> Any:
    return measure(outputs, batch, train)


def _as_float32(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _shapes(outputs: Any) -> str:
    return f"outputs {jax.tree.map(lambda leaf: list(leaf.shape), outputs)}"


def _kind(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"


def _metrics_complaint(objective: str, metrics: Mapping[Any, Any]) -> str | None:
    for name, value in metrics.items():
        if not isinstance(name, str) or not re.fullmatch(NAME, name) or name in TAKEN:
            taken = "the name is taken" if name in TAKEN else "a name begins with a letter, and has no spaces or slashes"
            return f"{objective!r} returns a metric {name!r}; {taken}"
        if complaint := _metric_complaint(f"metric {name!r} of {objective!r}", value):
            return complaint.replace(" returns ", " is ")
    return None


def _best_problems(config: Config, metrics: list[str]) -> list[str]:
    """Whether what checkpoints are chosen by is measured in evaluation, and chosen the right way."""
    measured, best = [LOSS, *metrics], config.best
    if best.metric not in measured:
        names = f"measured are {', '.join(measured)}{did_you_mean(best.metric, measured)}"
        return [f"eval.best: {best.metric!r} is not measured; {names}"]
    lower = _lower_is_better(config.objective, best.metric)
    if lower in (None, best.lower):
        return []
    right = dataclasses.replace(best, lower=lower)
    return [f'eval.best: {str(best)!r}; of {best.metric} {"lower" if lower else "higher"} is better: "{right}"']


def _lower_is_better(objective: ObjectiveConfig, metric: str) -> bool | None:
    """Which way a metric is better; None if it is the user's."""
    own = [metric_name(name) for name in objective.metrics if name not in METRICS]
    return None if objective.name not in NAMES or metric in own else LOWER_IS_BETTER.get(metric)
