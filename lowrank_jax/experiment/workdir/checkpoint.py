"""Checkpoints: written by orbax in the background, verified when they are restored.

Orbax restores an array whose bytes have changed on disk without an error, and takes a truncated step for the latest.  So every
step stores a digest of each array and restoring compares them; a damaged step is reported, and the one before it is used.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.hosts import processes
from lowrank_jax.experiment.workdir.checked_json import seal, unseal
from lowrank_jax.experiment.workdir.digest import digests
from lowrank_jax.experiment.workdir.orbax_logs import drop_unfinished, quiet_reads, quiet_saves
from lowrank_jax.experiment.workdir.orbax_processes import all_processes, barrier, handlers, this_process
from lowrank_jax.paths import named_leaves
from lowrank_jax.text import first_line

_SCORES = "scores.json"
_GONE = "gone"
_OPEN_ATTEMPTS = 5  # to list the steps of a run that may be deleting some


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message says which one and why."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
      step: its number.
      state: the tree that was asked for.
      info: what was saved with it: `data`, the state of the data iterator; `score`, by which checkpoints are chosen, if it
        was evaluated; `seconds` of training.
      damaged: the reason by newer step that could not be used.
    """

    step: int
    state: Any
    info: dict[str, Any]
    damaged: dict[int, str]


@dataclasses.dataclass
class _LatestAndBest(managers.PreservationPolicy):
    """Keeps the latest steps and the best one.  Orbax's own policy reads scores that no digest protects."""

    latest: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.latest :], self.best()}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one work directory.

    If a run has several processes, all of them call every method; they share the writing, each reads its own part of every
    array, and they agree on which steps can be used.

    Args:
      directory: where they are; created if missing.
      keep: the number of latest checkpoints to keep, besides the one with the highest score.
      read_only: nothing is written or moved, as evaluation needs it.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 2, read_only: bool = False):
        self.directory = _absolute(epath.Path(directory))  # orbax takes absolute paths only
        self._read_only = read_only
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a folder")
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(keep, self.best),
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            create=False,  # orbax refuses to if the barriers are the coordinator's
            multiprocessing_options=all_processes(),
            async_options=ocp.AsyncOptions(barrier_sync_fn=barrier()) if processes.several() else None,
        )
        quiet_saves()
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=this_process())
        self._manager = self._open()
        self._scores = self._read_scores()

    def _open(self) -> ocp.CheckpointManager:
        if not self._read_only and jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
        processes.barrier()
        manager = functools.partial(ocp.CheckpointManager, self.directory, options=self._options, handler_registry=handlers())
        for _ in range(_OPEN_ATTEMPTS - 1):
            # A run that is still training may delete a step after orbax has listed it.
            with contextlib.suppress(FileNotFoundError):
                return manager()
        return manager()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the highest score, the later of equals; None if none was evaluated."""
        scored = [step for step in self.steps() if step in self._scores]
        return max(scored, key=lambda step: (self._scores[step], step), default=None)

    def best_score(self) -> float:
        """The highest score of the steps that are there; -1 if none was evaluated."""
        best = self.best()
        return -1.0 if best is None else self._scores[best]

    def note_score(self, step: int, score: float) -> None:
        """Records the score of a step, which may be saved before or after."""
        self._scores[step] = score
        if jax.process_index():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f".{_SCORES}.partial"
        partial.write_text(json.dumps(seal({str(step): score for step, score in self._scores.items()})))
        partial.replace(self.directory / _SCORES)

    def _read_scores(self) -> dict[int, float]:
        """What `note_score` wrote; if that is damaged, the scores in the steps' own records."""
        try:
            return {int(step): score for step, score in unseal(json.loads((self.directory / _SCORES).read_text())).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            records = {step: self._read_record(step) for step in self.steps()}
            return {step: info["score"] for step, info in records.items() if info and info.get("score") is not None}

    def _read_record(self, step: int) -> dict[str, Any] | None:
        with quiet_reads():
            try:
                return unseal(self._read_items(step, info=ocp.args.JsonRestore()).info)
            except Exception:  # restoring the step reports what is wrong with it
                drop_unfinished()
                return None

    def save(self, step: int, state: Any, info: dict[str, Any]) -> None:
        """Starts to write a step; returns as soon as the arrays are copied off the devices."""
        record = seal({**info, "digests": digests(state)})
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), info=ocp.args.JsonSave(record))
        with self._reporting():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until everything is on disk."""
        with self._reporting():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns a failed save, often the one begun before, into a CheckpointError: no space, no permission, no connection."""
        try:
            yield
        except Exception as error:  # tensorstore reports a full disk as a ValueError
            raise CheckpointError(f"{self.directory}: cannot write a checkpoint: {_reason(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Waits for pending saves; not if this process of several has failed, of which the others do not know."""
        if exception[0] and processes.several():
            return
        self._reader.close()
        with contextlib.suppress(Exception) if exception[0] else self._reporting():  # the failure is reported already
            self._manager.close()

    def restore(self, target: Any) -> Restored | None:
        """Restores the newest usable step; None if there are no steps.

        Args:
          target: shapes, dtypes and shardings of the tree to restore (`jax.ShapeDtypeStruct`s); a mapping of some
            of the state's fields restores those alone.

        Raises:
          CheckpointError: there are steps, and none is usable.
        """
        damaged: dict[int, str] = {}
        steps = self._agreed_steps()
        while steps:
            step = steps.pop()
            attempt = self._attempt(step, target)
            if isinstance(attempt, Restored):
                self._set_aside(list(damaged))
                return dataclasses.replace(attempt, damaged=damaged)
            if attempt != _GONE:
                damaged[step] = attempt
            else:  # deleted by a run that is still training: it has newer ones by now
                self._manager.reload()
                damaged, steps = {}, self._agreed_steps()
        if damaged:
            reasons = "\n".join(f"  step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(f"{self.directory}: no usable checkpoint\n{reasons}")
        return None

    def restore_step(self, step: int, target: Any) -> Restored | None:
        """Restores this step; None if it was deleted, as a run that is still training does with older ones.

        Raises:
          CheckpointError: it is damaged.
        """
        attempt = self._attempt(step, target)
        if isinstance(attempt, Restored):
            return attempt
        if attempt != _GONE:
            raise CheckpointError(f"checkpoint {step} is damaged: {attempt}")
        return None

    def _agreed_steps(self) -> list[int]:
        """The steps that process 0 sees; a run that is still training may delete some at any time."""
        return json.loads(processes.exchange(json.dumps(self.steps()))[0])

    def _attempt(self, step: int, target: Any) -> Restored | str:
        """The step, or why it cannot be used: `_GONE`, or what is wrong with some process's part."""
        result = self._try(step, target)
        reasons = [reason for reason in processes.exchange(result if isinstance(result, str) else "") if reason]
        if _GONE in reasons:
            return _GONE
        if reasons or isinstance(result, str):
            return reasons[0]
        # Every process has its part, so all of them can compute digests.
        for name, digest in digests(result.state).items():
            if result.info["digests"].get(name) != digest:
                return f"digest of {name} differs"
        return result

    def _try(self, step: int, target: Any) -> Restored | str:
        with quiet_reads():
            try:
                return self._read(step, target)
            except (PermissionError, MemoryError):  # not the step's fault
                raise
            except Exception as error:  # a damaged file can make tensorstore, zstd, JSON or orbax raise nearly anything
                reason = _reason(error)
            drop_unfinished()
        return reason if (self.directory / str(step)).exists() else _GONE

    def _read(self, step: int, target: Any) -> Restored:
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        state_args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        items = self._read_items(step, state=state_args, info=ocp.args.JsonRestore())
        missing = [name for name, leaf in named_leaves(items.state).items() if isinstance(leaf, jax.ShapeDtypeStruct)]
        if missing:  # orbax leaves the shapes of what it does not find
            raise ValueError(f"has no array {missing[0]}")
        return Restored(step, items.state, unseal(items.info), {})

    def _read_items(self, step: int, **items: Any) -> Any:
        return self._reader.restore(self.directory / str(step), args=ocp.args.Composite(**items))

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged steps out of the way of later saves; nothing is deleted."""
        if self._read_only or not steps:
            return
        if jax.process_index() == 0:
            folder = self.directory.parent / "damaged"
            folder.mkdir(parents=True, exist_ok=True)
            for step in steps:
                copies = sum(1 for other in folder.iterdir() if other.name.split("-")[0] == str(step))
                (self.directory / str(step)).rename(folder / (f"{step}-{copies}" if copies else str(step)))
        processes.barrier()
        self._manager.close()
        self._manager = self._open()


def _absolute(path: epath.Path) -> epath.Path:
    if "://" not in str(path):
        return path.resolve()
    if str(path).startswith("gs://"):
        try:
            importlib.import_module("google.cloud.storage")  # orbax asks it for the kind of the bucket
        except ImportError:
            raise CheckpointError(f"{path}: checkpoints there need pip install 'lowrank_jax[gcs]'") from None
    return path


def _reason(error: Exception) -> str:
    """One line; of a long one, which names a file several times, both ends: the reason comes last."""
    line = first_line(error)
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-115:]}"
