"""A trace of a few training steps, for TensorBoard's profiler.

Every process writes its own part: WORKDIR/plugins/profile/RUN/process_N.xplane.pb, where RUN names the steps.
"""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
from etils import epath

from lowrank_jax.experiment import temporary
from lowrank_jax.experiment.workdir import files
from lowrank_jax.text import first_line


class StepProfiler:
    """Traces a range of training steps.

    Args:
      steps: the first and the last step to trace, counted as in the log; None to trace none.
      folder: the work directory, local or remote, which holds TensorBoard's event files.
      state: returns the arrays of the current step, to wait for.
      paused: a context whose time does not count as training time.
      say: takes a line for the console.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        folder: epath.Path,
        *,
        state: Callable[[], Any],
        paused: Callable[[], AbstractContextManager[None]],
        say: Callable[[str], None],
    ):
        self._first, self._last = steps or (0, 0)
        self._folder, self._state, self._paused, self._say = folder, state, paused, say
        self._done: list[int] = []  # traced so far, while a trace is being taken
        self._kept = contextlib.ExitStack()  # the folder of the trace, until it is moved

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for a step and the reading of its batch."""
        if not self._first <= number <= self._last:
            yield
            return
        if not self._done:
            jax.block_until_ready(self._state())  # the steps before are not part of the trace
            with self._paused(), self._or_without():
                self._start()
        if number > self._last:  # by now
            yield
            return
        self._done.append(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._last:
            self._stop()

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Writes what was traced when the run stops or fails within the steps."""
        with self._kept:
            if self._done:
                self._stop(wait=exception[0] is None)  # what a failed step was to compute may never come

    def _start(self) -> None:
        self._local = self._kept.enter_context(temporary.folder("lowrank_trace_"))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # an event for every call of a Python function would slow the steps down
        jax.profiler.start_trace(self._local, profiler_options=options)

    def _stop(self, *, wait: bool = True) -> None:
        if wait:
            jax.block_until_ready(self._state())
        with self._paused(), self._or_without():
            run = self._folder / "plugins" / "profile" / f"steps_{self._done[0]}_{self._done[-1]}"
            # Not into the work directory at once: jax's profiler knows no buckets, it names the run after the clock of each
            # process, so that the parts of one would end up in several, and two processes of a host would write one file.
            with self._kept:
                jax.profiler.stop_trace()
                for folder in (run.parent, run):
                    files.refuse_link(folder)
                files.make_folder(run)
                for file in pathlib.Path(self._local).rglob("*.xplane.pb"):
                    files.write(run / f"process_{jax.process_index()}.xplane.pb", file.read_bytes())
            self._say(f"traced steps {self._done[0]} to {self._done[-1]}: {run}")
        self._done = []

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        """A trace that cannot be taken or written does not end training; every process reports its own part."""
        try:
            yield
        except Exception as error:  # of the profiler, or of whatever kind of bucket
            print(f"steps {self._first} to {self._last} could not be traced: {first_line(error)}", file=sys.stderr, flush=True)
            self._last = 0
