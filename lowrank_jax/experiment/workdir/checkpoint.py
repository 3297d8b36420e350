"""Checkpoints: written by orbax in the background, verified when they are restored.

Orbax restores an array whose bytes have changed on disk without an error, and takes a truncated step for the latest.  So every
step has a record, under a seal, of what it is: its number, a digest of its experiment's settings, and a digest of each array.
Restoring compares them; a step that is not what its folder's name says, or damaged, is reported, and the one before it is used.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lowrank_jax.checks import is_number
from lowrank_jax.experiment.errors import CheckpointError
from lowrank_jax.experiment.hosts import processes
from lowrank_jax.experiment.workdir import files, step_folders
from lowrank_jax.experiment.workdir.checked_json import seal, unseal
from lowrank_jax.experiment.workdir.digest import digests
from lowrank_jax.experiment.workdir.orbax_logs import drop_unfinished, quiet_reads, quiet_saves
from lowrank_jax.experiment.workdir.orbax_processes import all_processes, barrier, handlers, this_process
from lowrank_jax.paths import named_leaves
from lowrank_jax.text import first_line

_SCORES = "scores.json"
_GONE = "gone"
_MANIFEST = "manifest.ocdbt"  # of the arrays


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

    @property
    def names_itself(self) -> bool:
        """Whether the record has the step's number and experiment; those of earlier versions do not."""
        return "experiment" in self.info


class Checkpoints:
    """The checkpoints of one work directory.

    Orbax writes and reads steps; which of them are there, and which are kept, is decided here.  Its CheckpointManager reads
    files of every step before it lists any, and ends with whatever they do to it.

    If a run has several processes, all of them call every method; they share the writing, each reads its own part of every
    array, and they agree on which steps can be used.

    Args:
      directory: where they are; created if missing.
      experiment: the digest of the settings that they belong to; None to take any.
      earlier: the digests of the experiments that this one extends, whose steps are its own.
      keep: the number of latest checkpoints to keep, besides the one with the highest score.
      confirmed: called with each step once it is on disk and can be found there, and with one that is restored.
      read_only: nothing is written or moved, as evaluation needs it.

    Attributes:
      on_disk: the latest step that is known to be on disk, as process 0 knows it; None if there is none.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        experiment: str | None = None,
        *,
        earlier: Collection[str] = (),
        keep: int = 2,
        confirmed: Callable[[int], object] = lambda step: None,
        read_only: bool = False,
    ):
        self.directory = step_folders.absolute(epath.Path(directory))  # orbax takes absolute paths only
        self._experiment, self._keep, self._confirmed = experiment, keep, confirmed
        self._earlier = tuple(earlier)
        self.on_disk: int | None = None
        self._waiter = concurrent.futures.ThreadPoolExecutor(1, "checkpoint_waiter")
        self._saving: concurrent.futures.Future[None] | None = None
        self._unconfirmed: int | None = None  # the step that is being saved
        self._spare: list[int] = []  # steps to delete once it is
        self._strange: dict[int, str] = {}  # steps that orbax must not see, and what is said of them
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a folder")
        quiet_saves()
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=this_process())
        self._writer = None if read_only else self._open()
        self._own: list[int] = []  # the same in all processes
        if self._writer:
            self._own = self._agreed_steps()
            self.best()  # all processes read the scores together

    def _open(self) -> ocp.AsyncCheckpointer:
        if jax.process_index() == 0:
            files.make_folder(self.directory)
            for path, reason in step_folders.strangers(self.directory).items():
                if step_folders.NUMBER.fullmatch(path.name):
                    self._strange[int(path.name)] = reason
                self._move_aside(path)
            for folder in step_folders.unfinished(self.directory):
                folder.rmtree()
        processes.barrier()
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(handler_registry=handlers()),
            multiprocessing_options=all_processes(),
            async_options=ocp.AsyncOptions(barrier_sync_fn=barrier()) if processes.several() else ocp.AsyncOptions(),
        )

    def steps(self) -> list[int]:
        """The steps that are there, and one that is being saved."""
        return list(self._own) if self._writer else step_folders.stored(self.directory)

    def best(self) -> int | None:
        """The step with the highest score, the later of equals; None if none was evaluated."""
        return self._best(self.steps())

    def _best(self, steps: Sequence[int]) -> int | None:
        scored = [step for step in steps if step in self._scores]
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
        files.make_folder(self.directory)
        text = json.dumps(seal({str(step): score for step, score in self._scores.items()}))
        files.write(self.directory / _SCORES, text.encode())

    @functools.cached_property
    def _scores(self) -> dict[int, float]:
        """What `note_score` wrote, and the steps' own records, which count where they differ; as process 0 reads both."""
        scores = {}
        if jax.process_index() == 0:
            own = {step: info for step, info in self.records().items() if not self._other(step, info)}
            recorded = {step: info["score"] for step, info in own.items() if is_number(info.get("score"))}
            scores = self._noted_scores() | recorded
        return dict(json.loads(processes.exchange(json.dumps([*scores.items()]))[0]))

    def _noted_scores(self) -> dict[int, float]:
        try:
            noted = unseal(files.read_json(self.directory / _SCORES))
            return {
                int(step): score for step, score in noted.items() if step_folders.NUMBER.fullmatch(step) and is_number(score)
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or damaged
            return {}

    def records(self) -> dict[int, dict[str, Any]]:
        """The records that can be read, by step; restoring a step reports what is wrong with it."""
        records = {step: self._read_record(step) for step in self.steps()}
        return {step: info for step, info in records.items() if info is not None}

    def _read_record(self, step: int) -> dict[str, Any] | None:
        if step_folders.unreadable(self.directory / str(step)):
            return None
        with quiet_reads():
            try:
                return _unsealed(self._read_items(step, info=ocp.args.JsonRestore()).info)
            except Exception:
                drop_unfinished()
                return None

    def _other(self, step: int, info: dict[str, Any]) -> str:
        """Of what else a step is, by its record; "" if it is what it should be, or of a version that did not say."""
        if info.get("step", step) != step:
            return f"it is step {info['step']} under another name"
        owner = info.get("experiment", self._experiment)
        if self._experiment and owner not in (self._experiment, *self._earlier):
            return "it belongs to another experiment"
        return ""

    def check_experiment(self) -> None:
        """Raises CheckpointError if a step belongs to another experiment, or is none of this folder's."""
        for step, info in self.records().items():
            if other := self._other(step, info):
                raise CheckpointError(f"{self.directory / str(step)}: {other}. Use a new --workdir, or the old settings.")

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """The latest of these steps, and the best."""
        return {step for step in (*sorted(steps)[-self._keep :], self._best(steps)) if step is not None}

    def tidy(self) -> None:
        """Deletes the steps that are not to be kept, which a kill between a save and that leaves."""
        assert self._writer
        self._choose_kept(self._agreed_steps())
        self._delete_spare()
        processes.barrier()

    def _choose_kept(self, steps: Sequence[int]) -> None:
        kept = self._kept(steps)
        self._own, self._spare = sorted(kept), sorted(set(steps) - kept)

    def _delete_spare(self) -> None:
        spare, self._spare = self._spare, []
        for step in spare if jax.process_index() == 0 else ():
            with contextlib.suppress(FileNotFoundError):
                (self.directory / str(step)).rmtree()

    def save(self, step: int, state: Any, info: dict[str, Any]) -> None:
        """Starts to write a step; returns as soon as the arrays are copied off the devices and the step before is on disk."""
        self.wait()
        assert self._writer
        itself = {"step": step} | ({"experiment": self._experiment} if self._experiment else {})
        record = seal({**info, **itself, "digests": digests(state)})
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), info=ocp.args.JsonSave(record))
        self._choose_kept([*self._own, step])
        self._unconfirmed = step
        with self._reporting():
            self._writer.save(self.directory / str(step), args=items)
            self._saving = self._waiter.submit(self._writer.wait_until_finished)

    def wait(self) -> None:
        """Waits until everything is on disk."""
        assert self._writer
        with self._reporting():
            self._finish()

    def confirm(self) -> None:
        """Confirms the step that is being saved, if it is on disk by now; does not wait.  `wait` reports a save that failed."""
        if self._saving and self._saving.done() and not self._saving.exception():
            self.wait()

    def _finish(self) -> None:
        saving, self._saving = self._saving, None
        if saving:
            saving.result()
        self._confirm()

    def _confirm(self) -> None:
        """Makes sure that what was saved is there: orbax reports the success of saves whose files it has lost."""
        step, self._unconfirmed = self._unconfirmed, None
        if step is None or jax.process_index():
            return
        if not (self.directory / str(step) / "state" / _MANIFEST).exists() or self._read_record(step) is None:
            raise ValueError(f"step {step} was written, and is not there")
        self._note(step)
        self._delete_spare()

    def _note(self, step: int) -> None:
        self.on_disk = step
        self._confirmed(step)

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
        try:
            with contextlib.suppress(Exception) if exception[0] else self._reporting():  # the failure is reported already
                if self._writer:
                    try:
                        self._finish()
                    finally:
                        self._writer.close()
        finally:
            self._waiter.shutdown(wait=False)
            self._reader.close()

    def restore(self, target: Any, unfit: Callable[[Restored], str] = lambda restored: "") -> Restored | None:
        """Restores the newest usable step; None if there are no steps.

        Args:
          target: shapes, dtypes and shardings of the tree to restore (`jax.ShapeDtypeStruct`s), or a function that gives them
            for a step; a mapping of some
            of the state's fields restores those alone.
          unfit: says why a step that is as it was saved cannot be used; "" if it can.

        Raises:
          CheckpointError: there are steps, and none is usable.
        """
        damaged: dict[int, str] = {}
        steps = self._agreed_steps()
        while steps:
            step = steps.pop()
            attempt = self._attempt(step, target)
            if isinstance(attempt, Restored):
                attempt = unfit(attempt) or attempt
            if isinstance(attempt, Restored):
                self._set_aside(damaged)
                if self._writer:
                    self._note(step)
                return dataclasses.replace(attempt, damaged=self._strange | damaged)
            if attempt != _GONE:
                damaged[step] = attempt
            else:  # deleted by a run that is still training: it has newer ones by now
                damaged, steps = {}, self._agreed_steps()
        if damaged:
            reasons = "\n".join(f"  step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(f"{self.directory}: no usable checkpoint\n{reasons}")
        return None

    def restore_step(self, step: int, target: Any) -> Restored | None:
        """Restores this step; None if it was deleted, as a run that is still training does with older ones.

        Raises:
          CheckpointError: it cannot be used.
        """
        attempt = self._attempt(step, target)
        if isinstance(attempt, Restored):
            return attempt
        if attempt != _GONE:
            raise CheckpointError(f"checkpoint {step} cannot be used: {attempt}")
        return None

    def _agreed_steps(self) -> list[int]:
        """The steps that process 0 sees; a run that is still training may delete some at any time."""
        return json.loads(processes.exchange(json.dumps(step_folders.stored(self.directory)))[0])

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
        folder = self.directory / str(step)
        if reason := "it is a link" if files.is_link(folder) else step_folders.unreadable(folder):
            return reason
        with quiet_reads():
            try:
                return self._read(step, target)
            except (PermissionError, MemoryError):  # not the step's fault
                raise
            except Exception as error:  # a damaged file can make tensorstore, zstd, JSON or orbax raise nearly anything
                reason = _reason(error)
            drop_unfinished()
        step_folders.check_readable(folder)
        return reason if folder.exists() else _GONE

    def _read(self, step: int, target: Any) -> Restored:
        target = target(step) if callable(target) else target
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        state_args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        info = _unsealed(self._read_items(step, info=ocp.args.JsonRestore()).info)
        if other := self._other(step, info) or _of_another_network(info["digests"], target):
            raise ValueError(other)
        items = self._read_items(step, state=state_args)
        leaves = named_leaves(items.state)
        missing = [name for name, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
        if missing:  # orbax leaves the shapes of what it does not find
            raise ValueError(f"has no array {missing[0]}")
        if (stored := int(leaves.get("step", step))) != step:
            raise ValueError(f"its state is that of step {stored}")
        return Restored(step, items.state, info, {})

    def _read_items(self, step: int, **items: Any) -> Any:
        return self._reader.restore(self.directory / str(step), args=ocp.args.Composite(**items))

    def _set_aside(self, steps: Collection[int]) -> None:
        """Moves damaged steps out of the way of later saves; nothing is deleted."""
        if self._writer is None or not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                self._move_aside(self.directory / str(step))
        processes.barrier()
        self._own = [step for step in self._own if step not in steps]

    def _move_aside(self, step: epath.Path) -> None:
        folder = self.directory.parent / "damaged"
        files.make_folder(folder)
        target = folder / step.name
        step.rename(files.free_name(target) if files.is_there(target) else target)


def _of_another_network(stored: Mapping[str, Any], target: Any) -> str:
    """Which of its arrays a step lacks, or has beyond those of the parts that are wanted; "" if they are the same."""
    wanted = named_leaves(target)
    parts = {name.split("/")[0] for name in wanted}
    missing = [name for name in wanted if name not in stored]
    strange = [name for name in stored if name.split("/")[0] in parts and name not in wanted]
    for names, problem in ((missing, "has no array"), (strange, "is of another network: it has an array")):
        if names:
            return f"{problem} {names[0]}{f' (and {len(names) - 1} more)' if names[1:] else ''}"
    return ""


def _unsealed(record: Any) -> dict[str, Any]:
    """What a step's record says.  Raises ValueError, KeyError or TypeError if it is damaged."""
    info = unseal(record)
    if not isinstance(info, dict) or not isinstance(info.get("digests"), dict):
        raise ValueError("its record has no digests")
    return info


def _reason(error: Exception) -> str:
    """One line; of a long one, which names a file several times, both ends: the reason comes last."""
    line = first_line(error)
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-115:]}"
