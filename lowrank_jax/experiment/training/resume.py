"""Where a process takes up a run: at the newest good checkpoint, or at the start."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lowrank_jax.experiment.data.pipeline import TrainBatches
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.evaluate import Evaluated
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError, Checkpoints, Restored
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError


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
    experiment: Experiment,
    batches: TrainBatches,
    checkpoints: Checkpoints,
    folder: Workdir,
    say: Callable[[str], None],
    *,
    restart: bool = False,
) -> Resumed:
    """Restores the newest good checkpoint, or makes the first state where there is none.

    What an interrupted process logged beyond that step is dropped from the work directory's metrics.

    Args:
      experiment, batches, checkpoints, folder: the run's.
      say: takes a line for the console.
      restart: begin anew if the run was saved and its checkpoints are gone; its old metrics are kept beside the new ones.

    Raises:
      CheckpointError: there are checkpoints, and none is good, or one is beyond the end of training.
      WorkdirError: the run was saved, and its checkpoints are gone.
      ConfigError: see `Start.state`.
    """
    restored = checkpoints.restore(experiment.shapes)
    if restored is None:
        _begin_anew(folder, say, restart)
        first = (put_batch(batches[i], experiment.mesh) for i in range(experiment.config.lowrank.moment_batches))
        return Resumed(experiment.init(first))
    checkpoints.tidy()
    return _resumed(restored, experiment.config.total_steps, folder, say)


def _begin_anew(folder: Workdir, say: Callable[[str], None], restart: bool) -> None:
    saved = folder.saved()
    if saved is None:
        folder.metrics.clear()  # of a process that ended before it saved anything
        return
    if not restart:
        raise WorkdirError(
            f"{folder.path}: step {saved} of this run was saved, and its checkpoints are gone. Put {folder.checkpoints} back,"
            " or begin anew with --restart, which keeps the old metrics."
        )
    kept = folder.metrics.set_aside()
    say(f"{folder.path} begins anew{f'; its old metrics are in {kept}' if kept else ''}")


def _resumed(restored: Restored, total: int, folder: Workdir, say: Callable[[str], None]) -> Resumed:
    step, info = restored.step, restored.info
    if step > total:
        raise CheckpointError(f"{folder.checkpoints / str(step)} is beyond the end of training, step {total}")
    for damaged, reason in restored.damaged.items():
        say(f"{folder.path}: checkpoint {damaged} cannot be used ({reason}); using {step} instead")
    if not restored.names_itself:
        say(f"{folder.path}: checkpoint {step} is of an earlier version, which did not record the experiment; taken as it is")
    evaluated = info.get("evaluated")
    if "metrics" in info:
        aside = folder.metrics.cut_back(info["metrics"])
    else:
        aside = folder.metrics.cut_after(step, evaluated=evaluated is not None)
    if aside:
        say(f"{folder.path}: metrics.jsonl is not as it was at step {step}; it is kept as {aside}, and begins anew from here")
    if step == total and evaluated is not None:
        say(f"{folder.path} has finished: step {step} of {total}; nothing is left to do")
    else:
        say(f"resuming {folder.path} from step {step} (data, randomness and optimiser included)")
    return Resumed(restored.state, step, step, evaluated, info["seconds"], tuple(info["window"]), info["data"])
