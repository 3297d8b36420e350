"""Evaluates every checkpoint as it appears, in a process of its own that training does not wait for."""

import contextlib
import dataclasses
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.evaluation import selection
from lowrank_jax.experiment.evaluation.evaluator import Evaluator, Subject, complaint
from lowrank_jax.experiment.evaluation.results import Rows
from lowrank_jax.experiment.training.evaluate import Interrupted
from lowrank_jax.experiment.training.stop import StopSignal
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError, Checkpoints
from lowrank_jax.experiment.workdir.metrics import Metrics
from lowrank_jax.experiment.workdir.workdir import RANKS, Workdir
from lowrank_jax.experiment.workdir.writer import Writer

_STOP_POLL_SECONDS = 0.2  # polling interval of the stop signal


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a watch ended.

    Attributes:
      interrupted: whether it was stopped before the runs had finished.
      failed: whether a work directory or a checkpoint could not be evaluated.
    """

    interrupted: bool
    failed: bool


def watch(
    workdirs: Sequence[str],
    evaluator: Evaluator,
    *,
    poll: float,
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> Outcome:
    """Evaluates the checkpoints of runs as they appear, until every run has finished.

    Results go to `watch_SPLIT.jsonl` and, for TensorBoard, to `watch_SPLIT/` in the run's work directory; the run's own files
    are not changed.  When started again, it continues with the checkpoints that are not in that file.

    Args:
      workdirs: of the runs, polled in turn; they need not exist yet.
      evaluator: has the split and the data folder.
      poll: polling interval in seconds.
      say: prints the rows of the table, and which runs it waits for.
      complain: prints what cannot be evaluated.
    """
    rows = Rows(workdirs, say)
    with StopSignal() as stop, contextlib.ExitStack() as stack:
        runs = [stack.enter_context(_WatchedRun(workdir, evaluator, rows, stop, complain)) for workdir in workdirs]
        for run in runs:
            if run.is_awaited():
                say(f"waiting for {run.workdir}")
        while not stop.requested:
            for run in runs:
                run.look()
            if all(run.finished for run in runs):
                break
            _sleep(poll, stop)
    return Outcome(not all(run.finished for run in runs), any(run.failed for run in runs))


class _WatchedRun:
    """One watched run; `look` is called at every poll."""

    def __init__(self, workdir: str, evaluator: Evaluator, rows: Rows, stop: StopSignal, complain: Callable[[str], None]):
        self.workdir, self.finished, self.failed = workdir, False, False
        self._evaluator, self._rows, self._stop, self._complain = evaluator, rows, stop, complain
        self._folder = Workdir(workdir)
        self._folder.check_bucket()
        self._subject: Subject | None = None  # None before the folder exists
        self._known: tuple[Any, Any] = None, None
        self._done: set[int] = set()
        self._suspects: set[int] = set()  # steps that could not be read at the last poll
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_WatchedRun":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def is_awaited(self) -> bool:
        """Whether training has not started yet.  A file never becomes a work directory."""
        return not (self._folder.path / "config.json").exists() and not self._folder.path.is_file()

    def look(self) -> None:
        """Evaluates new checkpoints, oldest first."""
        if self.finished or self._stop.requested:
            return
        if self.is_awaited():
            if self._subject:
                self._complain(f"{self.workdir} is gone; waiting for it")
                self._let_go()
            return
        try:
            if self._subject and self._settings() != self._known:
                if self._folder.read_config() != self._known[0]:
                    self._complain(f"{self.workdir}: config.json has changed; looked at anew")
                self._let_go()
            self._look(self._subject or self._open())
        except Interrupted:
            return
        except (UserError, OSError) as error:
            self._fail(error)
            self.finished = True

    def _settings(self) -> tuple[Any, Any]:
        """What the run's network follows from: its config, and the ranks that a warm-up may end with."""
        return self._folder.read_config(), self._folder.read_json(RANKS)

    def _let_go(self) -> None:
        """Forgets the run: whatever comes in its place has steps of the same numbers, and files of its own."""
        self._stack.close()
        self._subject, self._done, self._suspects = None, set(), set()

    def _open(self) -> Subject:
        self._known = self._settings()
        self._subject = subject = self._evaluator.open(self.workdir)
        for warning in selection.warnings({}, subject.data_changed):
            self._complain(f"{self.workdir}: {warning}")
        part = f"watch_{urllib.parse.quote(subject.split, safe='')}"
        self._folder.check_folder(part)
        self._stack.enter_context(self._folder.locked(1.0, name=f".{part}.lock", doing=f"watching {subject.split} of"))
        metrics = Metrics(self._folder.path / f"{part}.jsonl")
        metrics.drop_cut_line()
        self._done = {line["step"] for line in metrics.read()}
        self._writer = self._stack.enter_context(Writer(self._folder, part, board=subject.experiment.config.log.tensorboard))
        return subject

    def _look(self, subject: Subject) -> None:
        # Asked first: if training has ended, the steps listed next are all there will be.
        ended = (self._folder.path / "result.json").exists() or self._folder.diverged() is not None
        with subject.checkpoints() as checkpoints:
            steps = checkpoints.steps()
            for step in steps:
                if step not in self._done:
                    self._evaluate(step, checkpoints, subject)
        self._suspects &= set(steps)
        self.finished = ended and not self._suspects

    def _evaluate(self, step: int, checkpoints: Checkpoints, subject: Subject) -> None:
        try:
            restored = checkpoints.restore_step(step, subject.target)
        except CheckpointError as error:
            self._suspect(step, error)
            return
        if restored is None:  # deleted in the meantime
            return
        stop = self._stop
        evaluation = subject.evaluate(restored, lambda: stop.requested, lambda: stop.waiting_for_data(saved=True))
        metrics = {"eval": evaluation.metrics, "eval_raw": evaluation.raw_metrics or {}}
        self._writer.write(step, {f"{kind}/{name}": value for kind, part in metrics.items() for name, value in part.items()})
        self._writer.flush()
        self._done.add(step)
        self._suspects.discard(step)
        self._rows.add(self.workdir, evaluation)

    def _suspect(self, step: int, error: CheckpointError) -> None:
        """A step that cannot be read is damaged or half deleted; the next poll will tell."""
        if step not in self._suspects:
            self._suspects.add(step)
            return
        self._suspects.discard(step)
        self._done.add(step)
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        self._complain(complaint(self.workdir, error))


def _sleep(seconds: float, stop: StopSignal) -> None:
    end = time.monotonic() + seconds
    while not stop.requested and time.monotonic() < end:
        time.sleep(min(_STOP_POLL_SECONDS, seconds))
