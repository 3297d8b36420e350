"""What the loss of each class counts in training, by how often the class occurs."""

import dataclasses

import numpy as np

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.schema import BALANCED
from lowrank_jax.experiment.data.base import Split
from lowrank_jax.experiment.data.statistics import label_counts
from lowrank_jax.experiment.training.phases import Phases


def with_class_weights(phases: Phases, split: Split) -> Phases:
    """The experiments with `objective.class_weights="balanced"` counted in the training split.

    Raises:
      ConfigError: a class does not occur.
      DataError: the split cannot be read.
    """
    classes = phases.last.dataset.num_classes
    if phases.last.config.objective.class_weights != BALANCED or classes is None:
        return phases
    weights = balanced(label_counts(split, classes))
    return phases.map(lambda experiment: dataclasses.replace(experiment, class_weights=weights))


def balanced(counts: np.ndarray) -> tuple[float, ...]:
    """Weights `[classes]` by which all classes together count the same, and an example counts 1 on average.

    Args:
      counts: how often each class occurs, `[classes]`.

    Raises:
      ConfigError: a class does not occur.
    """
    missing = [str(index) for index in np.flatnonzero(np.asarray(counts) == 0)]
    if missing:
        advice = "give numbers, or take the class out"
        raise ConfigError("config", [f'objective.class_weights: "balanced", but class {missing[0]} does not occur; {advice}'])
    return tuple(float(weight) for weight in np.sum(counts) / (len(counts) * np.asarray(counts, np.float64)))
