"""On which examples a stored run is evaluated, and what is said of it besides."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import DataError, Dataset


def other_dataset(config: Config, ours: Dataset, name: str, data_dir: str | None = None) -> Dataset:
    """Another data set, read as the run would read it.

    Args:
      config: the run's.
      ours: what it was trained on.
      name: of the other data set.
      data_dir: where that is; None for where the run's is.

    Raises:
      ConfigError: it is unknown, or its images or labels do not fit the run's network.
    """
    size = ours.image_shape[0] if ours.cropped else None
    where = {"data_dir": data_dir or config.dataset.data_dir, "code_dir": config.code_dir}
    try:
        other = datasets.describe(name, _options(config, name), image_size=size, decoding=config.decoding, **where)
    except (ValueError, DataError) as error:
        raise ConfigError("--dataset", [str(error)]) from None
    if _kind(other) != _kind(ours):
        raise ConfigError("--dataset", [f"{name} has {_kind(other)}; the run was trained on {ours.name}, {_kind(ours)}"])
    return other


def _options(config: Config, name: str) -> Mapping[str, Any]:
    """The settings of another data set: the run's own, if it is stored in the same way and means the same by them."""
    given = config.dataset
    return given.kwargs if ":" in name and not datasets.is_code(name) and _prefix(name) == _prefix(given.name) else {}


def _prefix(name: str) -> str:
    return name.partition(":")[0]


def _kind(dataset: Dataset) -> str:
    shape = "x".join(map(str, dataset.image_shape))
    images = f"{shape} {'' if dataset.image_dtype == 'uint8' else f'{dataset.image_dtype} '}images"
    if not dataset.label.shape and dataset.num_classes is not None:
        return f"{images} of {dataset.num_classes} classes ({dataset.classes})"
    label = f"{images} with labels of shape {list(dataset.label.shape)} and type {dataset.label.dtype}"
    return label if dataset.num_classes is None else f"{label}, {dataset.num_classes} classes ({dataset.classes})"


def default_split(config: Config, dataset: Dataset) -> str:
    """The run's own `dataset.eval_split`, or another data set's only split.  Raises ConfigError if that one has several."""
    if dataset.name == config.dataset.name:
        return config.dataset.eval_split
    if len(dataset.sizes) > 1:
        raise ConfigError("--split", [f"choose a split of {dataset.name}: {', '.join(dataset.sizes)}"])
    return next(iter(dataset.sizes))


def warnings(damaged: Mapping[int, str], data_changed: Sequence[str] = ()) -> list[str]:
    """A line for each step that could not be used, given the reasons, and one if the data has changed, given what of it."""
    lines = [f"checkpoint {step} cannot be used ({reason})" for step, reason in damaged.items()]
    return [*lines, f"the data has changed since training: {'; '.join(data_changed)}"] if data_changed else lines
