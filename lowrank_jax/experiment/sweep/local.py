"""Runs trials in child processes on this machine, a few at a time.

The children are forked from a server that has imported everything and computed nothing: importing TensorFlow, which the
TensorBoard writer needs, takes longer than many a small run.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, util
from multiprocessing.connection import wait
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.errors import BAD_INPUT, DIVERGED, HOPELESS, InUse, UserError
from lowrank_jax.experiment.sweep.trials import Outcome, Trial, known_outcome
from lowrank_jax.experiment.training.stop import StopSignal
from lowrank_jax.experiment.workdir import files
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.experiment.workdir.writer import duration
from lowrank_jax.text import one_line

_TRIES = 2
_ELSEWHERE = Outcome("interrupted", "another process is training in it; once that has ended, the same command goes on")
_POLL_SECONDS = 0.2
_ENDING_SECONDS = 10.0  # that a run which is ending may need

PRELOADED = ("lowrank_jax.experiment.training.loop", "clu.metric_writers")
"""Modules that the fork server imports.  Text, not imports: this process does not need them, and they take seconds."""

Lowrank = Callable[[Sequence[str]], NoReturn]


def run(trials: Sequence[Trial], *, jobs: int, lowrank: Lowrank) -> dict[str, Outcome]:
    """Runs trials, `jobs` at a time, and shows their progress.

    A trial that fails is retried once, unless a retry would only repeat the failure: its config or data cannot be used, or it
    diverged.  SIGTERM and Ctrl-C save the running trials.

    Args:
      trials: in the order in which to start them.
      jobs: how many run at the same time.
      lowrank: runs a trial's command in a child process, where it is imported by its name, and exits.

    Returns:
      The outcome of every trial by name.
    """
    # By default each process takes most of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / jobs:.2f}")
    return _Engine(trials, jobs, lowrank).run()


@dataclasses.dataclass
class _Running:
    trial: Trial
    process: Any  # multiprocessing.context.ForkServerProcess
    tries: int
    begin: float
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)


class _Engine:
    def __init__(self, trials: Sequence[Trial], jobs: int, lowrank: Lowrank):
        self.outcomes = {trial.name: known for trial in trials if (known := known_outcome(trial))}
        self.waiting = [(trial, 1) for trial in trials if trial.name not in self.outcomes]
        self.running: list[_Running] = []
        self.total, self.jobs, self.lowrank = len(trials), jobs, lowrank
        self.seconds: list[float] = []  # of the trials that ended here
        self.stopping = False
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOADED))
        self.board = _Board(self)

    def run(self) -> dict[str, Outcome]:
        with self._no_orphans(), self.board:
            _start_server(self.context)  # until then there is nothing to save
            with StopSignal() as stop:
                self._run(stop)
        for trial, _ in self.waiting:
            self.outcomes[trial.name] = Outcome("interrupted", "not started")
        return self.outcomes

    def _run(self, stop: StopSignal) -> None:
        while self.running or (self.waiting and not self.stopping):
            while self.waiting and len(self.running) < self.jobs and not stop.requested:
                self._start(*self.waiting.pop(0))
            wait([run.process.sentinel for run in self.running], timeout=_POLL_SECONDS)
            if stop.requested and not self.stopping:
                self._stop()
            for run in [run for run in self.running if not run.process.is_alive()]:
                self.running.remove(run)
                self._ended(run)
            self.board.refresh()

    def _start(self, trial: Trial, tries: int) -> None:
        held = contextlib.ExitStack()
        if not _take(trial, held):
            self._note(trial, _ELSEWHERE)
            return
        arguments = (self.lowrank, list(trial.command), str(_log(trial)))
        process = self.context.Process(target=_train, args=arguments, name=trial.name)
        process.start()
        self.running.append(_Running(trial, process, tries, time.monotonic(), held))

    def _ended(self, run: _Running) -> None:
        status, trial = run.process.exitcode, run.trial
        run.held.close()
        self.seconds.append(time.monotonic() - run.begin)
        if status == 0 and trial.result():
            self._note(trial, Outcome("done"))
        elif self.stopping:
            self._note(trial, Outcome("interrupted", "the same command resumes it"))
        elif status == BAD_INPUT and _elsewhere(trial):  # another has begun since then
            self._note(trial, _ELSEWHERE)
        elif status == DIVERGED:
            self._note(trial, known_outcome(trial) or Outcome("diverged"))
        elif status in HOPELESS or run.tries == _TRIES:
            reason = _last_line(trial) or _exit_in_words(status)
            Workdir(trial.workdir).note_failure(diverged=False, reason=reason)
            self._note(trial, Outcome("failed", reason))
        else:
            self.board.say(f"{_exit_in_words(status)}; retrying: {trial.name}")
            self.waiting.insert(0, (trial, run.tries + 1))

    def _note(self, trial: Trial, outcome: Outcome) -> None:
        self.outcomes[trial.name] = outcome
        result = trial.result() if outcome.status == "done" else None
        metric = trial.config.best.metric
        value = result["eval"][metric] if result else None  # a number, unless it counts nobody
        tail = outcome.reason if value is None else f"{metric} {value:.4f}"
        self.board.say(f"[{len(self.outcomes)}/{self.total}] {outcome.status:8} {trial.name}  {tail}   eta {self.eta()}")

    def _stop(self) -> None:
        self.stopping = True
        for run in self.running:
            run.process.terminate()  # it saves and exits

    @contextlib.contextmanager
    def _no_orphans(self) -> Iterator[None]:
        """Whatever ends the sweep ends its trials: a second Ctrl-C, or an accident."""
        with interrupts.cleaning_up(_end_server), interrupts.cleaning_up(self._kill):
            try:
                yield
            finally:
                self._kill()

    def _kill(self) -> None:
        for run in list(self.running):
            run.process.kill()

    def eta(self) -> str:
        left = len(self.waiting) + len(self.running)
        if not self.seconds:
            return "..."
        return duration(sum(self.seconds) / len(self.seconds) * left / self.jobs)


class _Board:
    """What the user sees: a live table on a terminal, and one line per event."""

    def __init__(self, engine: _Engine):
        self._engine, self._console = engine, Console(soft_wrap=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if self._console.is_terminal else None
        self._shown = contextlib.ExitStack()

    def __enter__(self) -> "_Board":
        if self._live:
            self._shown.enter_context(interrupts.cleaning_up(self._live.stop))  # which brings the cursor back
            self._shown.enter_context(self._live)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._shown.close()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(one_line(text), markup=False)

    def refresh(self) -> None:
        if self._live:
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        engine = self._engine
        table = Table(box=None, pad_edge=False)
        for column in ("running", "time", "last line"):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for run in engine.running:
            cells = (run.trial.name, duration(time.monotonic() - run.begin), _last_line(run.trial))
            table.add_row(*(Text(one_line(cell)) for cell in cells))  # not markup
        ends = [outcome.status for outcome in engine.outcomes.values()]
        failed = sum(end in ("failed", "diverged") for end in ends)
        counts = f"{ends.count('done')} done, {len(engine.running)} running, {failed} failed, {len(engine.waiting)} waiting"
        state = "stopping: saving the running trials" if engine.stopping else f"eta {engine.eta()}"
        return Group(table, f"{counts}, {engine.total} in total   {state}")


def _take(trial: Trial, held: contextlib.ExitStack) -> bool:
    """Keeps other sweeps from the trial until `held` is closed; False if another sweep has it, or somebody trains in it."""
    folder = Workdir(trial.workdir)
    try:
        held.enter_context(folder.locked(0, name=".sweep.lock"))
        with folder.locked(_ENDING_SECONDS):
            return True
    except InUse:
        held.close()
        return False
    except (UserError, OSError):  # as the trial itself will say
        return True


def _elsewhere(trial: Trial) -> bool:
    with contextlib.ExitStack() as held:
        return not _take(trial, held)


def _start_server(context: Any) -> None:
    """Starts the server, and waits until it has imported everything."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it would die of one that comes before it ignores it itself
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    nothing = context.Process(target=int)
    nothing.start()
    nothing.join()


def _end_server() -> None:
    """What multiprocessing does at the end of Python, for a process that ends at once."""
    if pid := forkserver._forkserver._forkserver_pid:  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(util.get_temp_dir(), ignore_errors=True)  # of its socket


def _train(lowrank: Lowrank, arguments: list[str], log: str) -> None:
    """In the child: runs `lowrank` with these arguments and its output in a file."""
    with files.open_to_append(pathlib.Path(log)) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    interrupts.obey()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    lowrank(arguments)


def _end_with_the_parent() -> None:
    """A killed sweep must not leave runs behind that write to the same folders as its successor's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _log(trial: Trial) -> pathlib.Path:
    """The file of a trial's output: next to its other files, or under the current folder if those are remote."""
    scheme, remote, path = trial.workdir.rpartition("://")
    folder = pathlib.Path("sweep_logs", path) if scheme or remote else pathlib.Path(path)
    files.make_folder(folder)
    return folder / "log.txt"


def _last_line(trial: Trial) -> str:
    try:
        with files.open_to_read(_log(trial)) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:  # the child has not begun yet, or its log is no plain file
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _exit_in_words(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
