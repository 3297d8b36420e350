"""What of a stored run is evaluated: its config, which checkpoint, and on which examples."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax import named_code
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.config.trust import Trust, check_trust
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import DataError, Dataset
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError, Checkpoints, Restored
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.text import shown


def read_config(folder: Workdir, trusted: Trust, data_dir: str | None = None, *, looks_at_data: bool = True) -> Config:
    """The config of a run; no code is imported that is not trusted, and none out of the folder.

    Args:
      folder: the run's.
      trusted: what of the code that it names may be imported.
      data_dir: where the data is; None for where it was in training.
      looks_at_data: whether the caller will do more than its record tells.

    Raises:
      WorkdirError, ConfigError: there is none, or it is not valid.
      UntrustedCode: it names code that is not trusted; that of data which is known by its record is not imported.
    """
    values, source = folder.read_config(), f"{folder.path}/config.json"
    if data_dir:
        values["dataset"] = {**values["dataset"], "data_dir": data_dir}
    name = values["dataset"].get("name")
    unused = ("dataset.name",) if not looks_at_data and isinstance(name, str) and datasets.is_recorded(name) else ()
    check_trust(values, trusted, source, unused)
    with named_code.not_in(folder.path):
        return configs.parse(values, source=source, devices=None)


def evaluated_parts(shapes: TrainState) -> dict[str, Any]:
    """The parts of a state that evaluation needs, of a state's shapes or of a state."""
    optional = {"ema": shapes.ema, "collections": shapes.collections}
    kept = {name: part for name, part in optional.items() if part}
    return {"step": shapes.step, "params": shapes.params, "batch_stats": shapes.batch_stats, **kept}


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


def restore(checkpoints: Checkpoints, step: str, target: Any) -> Restored:
    """Restores a step by its number, `latest` or `best`.

    Raises:
      CheckpointError: there is no such step, or it cannot be read.
    """
    if step == "latest":
        restored = checkpoints.restore(target)
        if restored is None:
            raise CheckpointError(f"{checkpoints.directory} has no checkpoints yet")
        return restored
    chosen = _choose(checkpoints, step)
    restored = checkpoints.restore_step(chosen, target)
    if restored is None:
        raise CheckpointError(f"{checkpoints.directory}: the run deleted step {chosen} while it was being read")
    return restored


def _choose(checkpoints: Checkpoints, step: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.directory} has no checkpoints yet")
    if step == "best":
        best = checkpoints.best()
        if best is None:
            raise CheckpointError(
                f"{checkpoints.directory}: none of the checkpoints was evaluated, so none is the best; choose from {steps}"
            )
        return best
    chosen = {str(known): known for known in steps}.get(step.lstrip("0") or step[-1:])
    if chosen is None:
        raise CheckpointError(f"{checkpoints.directory} has no step {shown(step)[1:-1]}; choose from {steps}, latest or best")
    return chosen


def warnings(damaged: Mapping[int, str], data_changed: Sequence[str] = ()) -> list[str]:
    """A line for each step that could not be used, given the reasons, and one if the data has changed, given what of it."""
    lines = [f"checkpoint {step} cannot be used ({reason})" for step, reason in damaged.items()]
    return [*lines, f"the data has changed since training: {'; '.join(data_changed)}"] if data_changed else lines
