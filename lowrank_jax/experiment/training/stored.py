"""What is stored of a run: its config, its checkpoints, and the network that they are of, without its data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lowrank_jax import named_code
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import Config, MeshConfig
from lowrank_jax.experiment.config.trust import Trust, check_trust
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.training import ranks, recorded_data
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.phases import phases_of
from lowrank_jax.experiment.training.state import TrainState, evaluated_variables
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError, Checkpoints, Restored
from lowrank_jax.experiment.workdir.identity import digest_of, earlier_digests
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.text import shown


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run's network at one of its checkpoints.

    Attributes:
      workdir: the run's.
      config: as it is stored.
      experiment: whose state the checkpoint is, with the data set as it was recorded.
      restored: the checkpoint.
    """

    workdir: str
    config: Config
    experiment: Experiment
    restored: Restored

    def variables(self, *, raw: bool = False) -> dict[str, Any]:
        """What is evaluated: averaged weights where the run keeps them, unless the raw ones are asked for."""
        weights = evaluated_variables(self.restored.state)
        return weights.get("_raw", weights[""]) if raw else weights[""]


def open_network(workdir: str, step: str, trusted: Trust = False, devices: Sequence[Any] | None = None) -> Opened:
    """Opens a checkpoint: `latest`, `best` or a number.

    Args:
      workdir: of the run.
      step: which checkpoint.
      trusted: what of the code that its config names may be imported; that of data never is.
      devices: where the network runs; by default everywhere.

    Raises:
      WorkdirError, ConfigError, CheckpointError: the run cannot be read; the message says why.
      UntrustedCode: the run's config names code that is not trusted.
    """
    folder = Workdir(workdir)
    with recorded_data.used(folder):
        stored = read_config(folder, trusted, looks_at_data=False)
        config = recorded_data.as_trained(stored, folder)
        decided = ranks.read(folder, stored)
        phases = phases_of(dataclasses.replace(config, mesh=MeshConfig()), decided, workdir, devices)
        identity, earlier = digest_of(stored), earlier_digests(stored)
    with Checkpoints(folder.checkpoints, identity, earlier=earlier, read_only=True) as checkpoints:
        restored = restore(checkpoints, step, lambda step: evaluated_parts(phases.at(step).shapes))
    return Opened(workdir, stored, phases.at(restored.step), restored)


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
