"""The network of a stored run, without its data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lowrank_jax.experiment.config.schema import Config, MeshConfig
from lowrank_jax.experiment.config.trust import Trust
from lowrank_jax.experiment.evaluation import selection
from lowrank_jax.experiment.training import ranks, recorded_data
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.phases import phases_of
from lowrank_jax.experiment.training.state import evaluated_variables
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints, Restored
from lowrank_jax.experiment.workdir.identity import digest_of, earlier_digests
from lowrank_jax.experiment.workdir.workdir import Workdir


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
        stored = selection.read_config(folder, trusted, looks_at_data=False)
        config = recorded_data.as_trained(stored, folder)
        decided = ranks.read(folder, stored)
        phases = phases_of(dataclasses.replace(config, mesh=MeshConfig()), decided, workdir, devices)
        identity, earlier = digest_of(stored), earlier_digests(stored)
    with Checkpoints(folder.checkpoints, identity, earlier=earlier, read_only=True) as checkpoints:
        restored = selection.restore(checkpoints, step, lambda step: selection.evaluated_parts(phases.at(step).shapes))
    return Opened(workdir, stored, phases.at(restored.step), restored)
