"""Where a process takes up a run: at the newest good checkpoint, or at the start."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lowrank_jax.experiment.data.pipeline import TrainBatches
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.evaluate import Evaluated
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A run at the step where a process takes it up.

    Attributes:
      state: the state.
      step: updates made so far.
      saved: the step of the checkpoint; None at the start.
      evaluated: the evaluation of this state, if it was saved after one.
      seconds: of training in earlier processes.
      window: the metrics of the steps since the last log.
      data: where the reader of the training data is; None at the start.
    """

    state: TrainState
    step: int = 0
    saved: int | None = None
    evaluated: Evaluated | None = None
    seconds: float = 0.0
    window: tuple[dict[str, float], ...] = ()
    data: dict[str, Any] | None = None


def restore_or_start(
    experiment: Experiment, batches: TrainBatches, checkpoints: Checkpoints, folder: Workdir, say: Callable[[str], None]
) -> Resumed:
    """Restores the newest good checkpoint, or makes the first state where there is none.

    What an interrupted process logged beyond that step is dropped from the work directory's metrics.

    Args:
      experiment, batches, checkpoints, folder: the run's.
      say: takes a line for the console.

    Raises:
      CheckpointError: there are checkpoints, and none is good.
      ConfigError: see `Start.state`.
    """
    restored = checkpoints.restore(experiment.shapes)
    if restored is None:
        first = (put_batch(batches[i], experiment.mesh) for i in range(experiment.config.lowrank.moment_batches))
        state = experiment.init(first)
        folder.forget_metrics_after(-1, evaluated=False)
        return Resumed(state)
    step, info = restored.step, restored.info
    for damaged, reason in restored.damaged.items():
        say(f"{folder.path}: checkpoint {damaged} is damaged ({reason}); using {step} instead")
    evaluated = info.get("evaluated")
    folder.forget_metrics_after(step, evaluated=evaluated is not None)
    say(f"resuming {folder.path} from step {step} (data, randomness and optimiser included)")
    return Resumed(restored.state, step, step, evaluated, info["seconds"], tuple(info["window"]), info["data"])
