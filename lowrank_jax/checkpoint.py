"""Checkpoints: written by orbax in the background, checked on the way back in.

Orbax restores an array whose bytes have changed on disk without a word, and takes a truncated step for the latest.  So every
step stores a digest of each array, restoring compares them, and a damaged step is reported and the one before it used.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from lowrank_jax.digest import digests


class CheckpointError(Exception):
    """There is no checkpoint to go on from; the message lists what was tried."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A step as it came back.

    Attributes:
      step: its number.
      state: the tree that was asked for.
      info: what was saved beside it: `data`, the reader's state; `eval`, metrics if it was evaluated; `seconds` of training.
      damaged: newer steps that could not be used, each with the reason.
    """

    step: int
    state: Any
    info: dict[str, Any]
    damaged: dict[int, str]


class Checkpoints:
    """The checkpoints of one work directory.

    Args:
      directory: where they are; made on the first save.
      keep: how many of the latest to keep besides the best by `eval/top1`.
      read_only: for evaluation: nothing is written or moved.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 2, read_only: bool = False):
        self.directory = epath.Path(directory).resolve()  # orbax takes absolute paths only
        self._read_only = read_only
        self._options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["top1"],
            preservation_policy=managers.AnyPreservationPolicy(
                [
                    managers.LatestN(keep),
                    managers.BestN(get_metric_fn=lambda metrics: metrics["top1"], n=1, keep_checkpoints_without_metrics=False),
                ]
            ),
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory, options=self._options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest `top1`, the later of equals; None if none was evaluated."""
        scores = self._scores()
        return max(scores, key=lambda step: (scores[step], step), default=None)

    def best_score(self) -> float:
        """The highest `top1` of the steps that are there; -1 if none was evaluated."""
        return max(self._scores().values(), default=-1.0)

    def _scores(self) -> dict[int, float]:
        return {step: metrics["top1"] for step in self.steps() if (metrics := self._manager.metrics(step))}

    def save(self, step: int, state: Any, info: dict[str, Any]) -> None:
        """Starts to write a step; returns when the arrays are off the devices' hands."""
        body = {**info, "digests": digests(state)}
        sealed = {"body": body, "check": _check(body)}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), info=ocp.args.JsonSave(sealed))
        self._manager.save(step, args=items, metrics=info.get("eval"), force=True)

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Waits for what is being written."""
        self._manager.close()

    def restore(self, target: Any, *, newest: int | None = None) -> Restored | None:
        """The newest good step, at or before `newest`; None if there are no steps at all.

        Args:
          target: shapes, dtypes and shardings of the tree to restore (`jax.ShapeDtypeStruct`s); it may be a mapping of some
            of the state's fields, to read those alone.
          newest: a step number.

        Raises:
          CheckpointError: there are steps, and none is good.
        """
        damaged: dict[int, str] = {}
        steps = [step for step in self.steps() if newest is None or step <= newest]
        for step in reversed(steps):
            with _quiet_failure():
                try:
                    state, info = self._read(step, target)
                except Exception as error:  # a damaged file can make tensorstore, zstd, JSON or orbax raise nearly anything
                    damaged[step] = _first_line(error)
                    continue
            self._set_aside(list(damaged))
            return Restored(step, state, info, damaged)
        if damaged:
            reasons = "\n".join(f"  step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(f"{self.directory}: no checkpoint can be used\n{reasons}")
        return None

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        state_args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        items: Any = self._manager.restore(step, args=ocp.args.Composite(state=state_args, info=ocp.args.JsonRestore()))
        body = items.info["body"]
        if items.info["check"] != _check(body):
            raise ValueError("the digest of its own record differs")
        for name, digest in digests(items.state).items():
            if body["digests"].get(name) != digest:
                raise ValueError(f"digest of {name} differs")
        return items.state, body

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged steps out of the way of the saves to come; nothing is deleted."""
        if self._read_only or not steps:
            return
        folder = self.directory.parent / "damaged"
        folder.mkdir(parents=True, exist_ok=True)
        for step in steps:
            copies = sum(1 for other in folder.iterdir() if other.name.split("-")[0] == str(step))
            (self.directory / str(step)).rename(folder / (f"{step}-{copies}" if copies else str(step)))
        self._manager.close()
        self._manager = self._open()


@contextlib.contextmanager
def _quiet_failure() -> Iterator[None]:
    """When a read fails, orbax leaves its other reads unfinished, and Python complains of each as it is collected."""
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        log.setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda unraisable: None
        yield
        gc.collect()
        sys.unraisablehook = hook
        log.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _check(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
