"""What a try works with: a folder of its own, commands run by the package under test, and runs to spoil.

    KIND = Kind("checkpoints")

    @KIND.attempt
    def a_step_beyond_the_end(place):
        run = place.copy("halted")
        shutil.copytree(run / "checkpoints" / "100", run / "checkpoints" / "150")
        refused(place.train(run), "150")

    @KIND.attempts({"80 as 120": (80, 120), "100 as 110": (100, 110)})
    def a_step_copied_to_another_number(place, old, new):
        ...

A try holds if its function returns, and breaks if it raises: use `refused`, `tidy`, or plain asserts with a message.  Commands
are run as a user runs them, never through new names of the package, so that the same tries can be put to another version of it.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

TRAIN = (
    "train", f"--config={ROOT}/configs/digits_resnet.py", "--config.epochs=None", "--config.steps=120",
    "--config.checkpoint.every=20steps", "--config.eval.every=60steps",
)  # fmt: skip
"""A run of a few seconds, with checkpoints at every twentieth of its 120 steps."""

_MESS = re.compile(
    r"Traceback \(most recent call last\)|Exception ignored|Fatal Python error|Segmentation fault|^\s+File \"", re.M
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended; a status below 0 is a signal's, and None means that it did not end in time."""

    status: int | None
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"status {self.status}: {' / '.join((self.err or self.out).strip().splitlines()[-3:])[:300]}"


def tidy(ended: Ended, *statuses: int) -> Ended:
    """Asserts one of these statuses, and no traceback."""
    assert ended.status in (statuses or (0,)), f"expected {statuses or 0}, {ended}"
    assert not _MESS.search(ended.out + ended.err), f"a traceback, {ended}"
    return ended


def refused(ended: Ended, *words: str, status: int = 2, lines: int = 6) -> Ended:
    """Asserts a refusal: the status, no traceback, at most so many lines, which contain these words."""
    tidy(ended, status)
    said = ended.err.strip().splitlines()
    assert 0 < len(said) <= lines, f"{len(said)} lines, {ended}"
    missing = [word for word in words if word not in ended.err]
    assert not missing, f"does not say {missing}, {ended}"
    return ended


class Kind:
    """Tries of one kind, by name."""

    def __init__(self, name: str):
        self.name = name
        self.tries: dict[str, Callable[[Place], Any]] = {}

    def attempt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Registers a try."""
        self.tries[_words(function)] = function
        return function

    def attempts(self, cases: Mapping[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers a try for each case; a tuple is several arguments."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            for name, case in cases.items():
                arguments = case if isinstance(case, tuple) else (case,)
                self.tries[f"{_words(function)}: {name}"] = lambda place, given=arguments: function(place, *given)
            return function

        return register


def _words(function: Callable[..., Any]) -> str:
    return function.__name__.replace("_", " ")


class Package:
    """The package under test, in a folder; imported once, its commands run in forks."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch = folder, scratch
        self._servers: list[subprocess.Popen[str]] = []
        self._free: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._making = threading.Lock()

    def environment(self, changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """Of every command: on the CPU, with a compilation cache of the session's own."""
        usual = {"PYTHONPATH": str(self.folder), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(self.scratch / "cache")}
        merged = {**os.environ, **usual, **(changes or {})}
        return {name: value for name, value in merged.items() if value is not None}

    def popen(
        self,
        arguments: Sequence[Any],
        *,
        env: Mapping[str, str | None] | None = None,
        prefix: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """A command in a process of its own, as a user starts it; `prefix` is a command that runs it."""
        command = [*prefix, sys.executable, "-P", "-m", "lowrank_jax", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace", **kwargs}
        return subprocess.Popen(command, env=self.environment(env), start_new_session=True, **pipes)

    def fresh(self, arguments: Sequence[Any], timeout: float, **kwargs: Any) -> Ended:
        """Runs a command in a process of its own to its end."""
        begin = time.monotonic()
        process = self.popen(arguments, **kwargs)
        try:
            out, err = process.communicate(timeout=timeout)
            return Ended(process.returncode, out, err, time.monotonic() - begin)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            return Ended(None, out, err, time.monotonic() - begin)

    def forked(self, arguments: Sequence[Any], timeout: float, cwd: Path) -> Ended:
        """Runs a command in a fork of a process that has imported the package: sparing its imports."""
        with self._lock:
            server = self._free.pop() if self._free else self._start()
        out, err = cwd / ".stdout", cwd / ".stderr"
        request = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd),
            "out": str(out),
            "err": str(err),
            "timeout": timeout,
        }
        begin = time.monotonic()
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())["status"]
        with self._lock:
            self._free.append(server)
        said, complained = (path.read_text(errors="replace") for path in (out, err))
        return Ended(status, said, complained, time.monotonic() - begin)

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", Path(__file__).with_name("server.py")]
        server = subprocess.Popen(
            command, env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._servers.append(server)
        return server

    def prepared(self, name: str) -> Path:
        """A run to copy: `finished`, or `halted` as a kill left it after step 100."""
        with self._making:
            folder = self.scratch / name
            if not folder.exists():
                {"finished": self._finish, "halted": self._halt}[name](folder)
            return folder

    def _finish(self, folder: Path) -> None:
        partial = folder.with_name(f"{folder.name}.partial")
        tidy(self.fresh([*TRAIN, f"--workdir={partial}"], 600))
        partial.rename(folder)

    def _halt(self, folder: Path) -> None:
        partial = folder.with_name(f"{folder.name}.partial")
        process = self.popen([*TRAIN, "--config.log.every=1steps", f"--workdir={partial}"])
        while process.poll() is None and not (partial / "checkpoints" / "100").exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert (partial / "checkpoints" / "100").exists() and not (partial / "result.json").exists(), "could not be halted"
        shutil.rmtree(partial / "checkpoints" / "120", ignore_errors=True)
        partial.rename(folder)

    def close(self) -> None:
        """Ends the processes that were kept."""
        for server in self._servers:
            server.kill()
            server.wait()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a try happens.

    Attributes:
      path: an empty folder of its own, which is the current folder of its commands.
      package: the package under test.
    """

    path: Path
    package: Package

    def lowrank(self, *arguments: Any, timeout: float = 120) -> Ended:
        """Runs a command to its end, in a fork of a process that has imported everything."""
        return self.package.forked(arguments, timeout, self.path)

    def fresh(self, *arguments: Any, env: Mapping[str, str | None] | None = None, timeout: float = 180, **kwargs: Any) -> Ended:
        """Runs a command in a process of its own: where the environment, the start or signals matter."""
        return self.package.fresh(arguments, timeout, env=env, **{"cwd": self.path, **kwargs})

    def start(self, *arguments: Any, env: Mapping[str, str | None] | None = None, **kwargs: Any) -> Any:
        """Starts a command in a session of its own; the try ends it."""
        return self.package.popen(arguments, env=env, **{"cwd": self.path, **kwargs})

    def copy(self, name: str, to: str = "run") -> Path:
        """A copy of a prepared run, `finished` or `halted`, in this place."""
        return Path(shutil.copytree(self.package.prepared(name), self.path / to, symlinks=True))

    def train(self, workdir: Path, *flags: Any, timeout: float = 240) -> Ended:
        """Trains, or goes on with, the run of `TRAIN`."""
        return self.lowrank(*TRAIN, *flags, f"--workdir={workdir}", timeout=timeout)


def top1(run: Path) -> float:
    """What a finished run reports."""
    return json.loads((run / "result.json").read_text())["eval"]["top1"]
