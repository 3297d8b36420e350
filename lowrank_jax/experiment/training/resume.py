"""Where a process takes up a run: at the newest good checkpoint, or at the start."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank_jax.checks import is_number
from lowrank_jax.experiment.data.pipeline import TrainBatches
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training.evaluate import Evaluated
from lowrank_jax.experiment.training.phases import Phases
from lowrank_jax.experiment.training.stable_ranks import Row
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints, Restored
from lowrank_jax.experiment.workdir.files import is_count
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from lowrank_jax.text import one_line

Waiting = Callable[[], contextlib.AbstractContextManager[None]]

_TELL_SECONDS = 10.0
_TRACKED = ("loss", "grad_norm", "lr")  # of every step
_RANDOMNESS = ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_random_seed_offset", "jax_enable_x64")


def jax_settings() -> dict[str, Any]:
    """The settings of jax that a run's random numbers and types depend on, besides its own."""
    return {name: getattr(jax.config, name) for name in _RANDOMNESS}


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
      stable_ranks: of a warm-up that ends once they settle; see `StableRanks`.
    """

    state: TrainState
    step: int = 0
    saved: int | None = None
    evaluated: Evaluated | None = None
    seconds: float = 0.0
    window: tuple[dict[str, float], ...] = ()
    data: dict[str, Any] | None = None
    stable_ranks: tuple[Row, ...] = ()


def restore(
    phases: Phases, checkpoints: Checkpoints, folder: Workdir, say: Callable[[str], None], *, restart: bool = False
) -> Resumed | None:
    """Restores the newest good checkpoint; None where there is none, and the run begins.

    What an interrupted process logged beyond that step is dropped from the work directory's metrics.

    Args:
      phases, checkpoints, folder: the run's.
      say: takes a line for the console.
      restart: begin anew if the run was saved and its checkpoints are gone; its old metrics and ranks are kept beside the new
        ones.

    Raises:
      CheckpointError: there are checkpoints, and none is good.
      WorkdirError: the run was saved, and its checkpoints are gone.
      ConfigError: see `Start.state`.
    """
    experiment = phases.at(0)
    total = experiment.config.total_steps
    deciding = experiment.config.best.metric
    restored = checkpoints.restore(lambda step: phases.at(step).shapes, lambda restored: _unfit(restored, total, deciding))
    if restored is None:
        _begin_anew(folder, say, restart)
        return None
    checkpoints.tidy()
    return _resumed(restored, total, folder, say)


def first_batches(
    batches: TrainBatches, mesh: Mesh, count: int, say: Callable[[str], None], waiting: Waiting
) -> Iterator[dict[str, jax.Array]]:
    """The batches that the layers' inputs are measured on; they are counted aloud if it takes long."""
    told = time.monotonic()
    for i in range(count):
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            say(f"measuring the layers' inputs: {i:,} of {count:,} batches")
        with waiting():
            batch = batches[i]
        yield put_batch(batch, mesh)


def _begin_anew(folder: Workdir, say: Callable[[str], None], restart: bool) -> None:
    saved = folder.saved()
    if saved is not None and not restart:
        raise WorkdirError(
            f"{folder.path}: step {saved} of this run was saved, and its checkpoints are gone. Put {folder.checkpoints} back,"
            " or begin anew with --restart, which keeps the old metrics."
        )
    if saved is not None and (kept := folder.set_ranks_aside()):
        say(f"{folder.path}: ranks are decided anew; the old ones are in {kept}")
    folder.set_result_aside()
    if kept := folder.metrics.set_aside():
        say(f"{folder.path} begins anew, without a checkpoint; its old metrics are in {kept}")


def _unfit(restored: Restored, total: int, deciding: str) -> str:
    """Why training cannot go on from a checkpoint that is as it was saved; "" if it can."""
    step, info = restored.step, restored.info
    if step > total:
        return f"training ends at step {total}"
    valid = {
        "data": lambda data: data == {"next_index": step},
        "seconds": lambda seconds: is_number(seconds) and seconds >= 0,
        "window": lambda rows: isinstance(rows, list) and len(rows) <= step and _are_rows(rows, {*_TRACKED, deciding}),
        "evaluated": lambda parts: parts is None or _are_evaluations(parts, deciding),
        "jax": lambda settings: settings is None or (isinstance(settings, dict) and settings.keys() <= {*_RANDOMNESS}),
        "stable_ranks": lambda rows: rows is None or _are_stable_ranks(rows, step),
        "metrics": lambda digest: digest is None or (_has(digest, "bytes", "crc32") and all(map(is_count, digest.values()))),
    }
    wrong = [name for name, is_valid in valid.items() if not is_valid(info.get(name))]
    return f"its record has no valid {' and '.join(wrong)}" if wrong else ""


def _are_numbers(value: Any, *names: str) -> bool:
    """Whether a value is a mapping with at least these names, of numbers; a metric of one's own need not be finite."""
    return _has(value, *names) and all(type(number) in (int, float) for number in value.values())


def _are_rows(rows: list[Any], names: set[str]) -> bool:
    """Whether each value is the metrics of a step."""
    return all(
        _are_numbers(row, *names) and row.keys() == names and all(is_number(row[name]) for name in _TRACKED) for row in rows
    )


def _are_stable_ranks(rows: Any, last: int) -> bool:
    """Whether a value is what was seen at the ends of two epochs at most, none of them after the last step."""
    pairs = isinstance(rows, list) and len(rows) <= 2 and all(isinstance(row, list) and len(row) == 2 for row in rows)
    return pairs and all(is_count(step) and step <= last and _are_numbers(ranks) for step, ranks in rows)


def _are_evaluations(parts: Any, deciding: str) -> bool:
    """Whether a value is what the loop evaluated: a loss that is finite, and a metric that counts nobody need not be."""
    if not _has(parts, "eval"):
        return False
    return all(_are_numbers(part, "loss", deciding) and is_number(part["loss"]) for part in parts.values())


def _has(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and value.keys() >= set(names)


def _resumed(restored: Restored, total: int, folder: Workdir, say: Callable[[str], None]) -> Resumed:
    step, info = restored.step, restored.info
    for damaged, reason in restored.damaged.items():
        say(f"{folder.path}: checkpoint {damaged} cannot be used ({reason}); using {step} instead")
    if not restored.names_itself:
        say(f"{folder.path}: checkpoint {step} is of an earlier version, which did not record the experiment; taken as it is")
    ours = jax_settings()
    other = {name: value for name, value in (info.get("jax") or ours).items() if ours.get(name) != value}
    if other:
        was = ", ".join(f"{name} was {one_line(str(value))[:100]}, and is {ours.get(name)}" for name, value in other.items())
        raise WorkdirError(f"{folder.path} was trained under other settings of jax: {was}. Set them as they were.")
    evaluated = info.get("evaluated")
    if info.get("metrics"):
        aside = folder.metrics.cut_back(info["metrics"])
    else:
        aside = folder.metrics.cut_after(step, evaluated=evaluated is not None)
    if aside is not None:
        folder.metrics.append({"step": step})  # where they begin now
        kept = f"it is kept as {aside}, and" if aside else "nothing is left of it, and"
        say(f"{folder.path}: metrics.jsonl is not as it was at step {step}; {kept} a new one begins there")
    if step == total and evaluated is not None:
        say(f"{folder.path} has finished: step {step} of {total}; nothing is left to do")
    else:
        say(f"resuming {folder.path} from step {step} (data, randomness and optimiser included)")
    window, stable_ranks = tuple(info["window"]), _stable_ranks(info)
    return Resumed(restored.state, step, step, evaluated, info["seconds"], window, info["data"], stable_ranks)


def _stable_ranks(info: dict[str, Any]) -> tuple[Row, ...]:
    return tuple((step, ranks) for step, ranks in info.get("stable_ranks") or ())
