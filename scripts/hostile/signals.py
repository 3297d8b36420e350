"""Ctrl-C, SIGTERM and SIGHUP at any moment of any command; pipes whose reader leaves; streams that are closed."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.hostile.harness import ROOT, TRAIN, Ended, Kind, Place, tidy

KIND = Kind("signals")

_DIGITS = f"--config={ROOT}/configs/digits_resnet.py"
_SAID: dict[int, str] = {
    signal.SIGINT: "lowrank: interrupted\n",
    signal.SIGTERM: "lowrank: ended by SIGTERM\n",
    signal.SIGHUP: "lowrank: ended by SIGHUP\n",
}
_PATIENCE = (
    90  # seconds, on a busy machine, from a signal to the end; steps, a save and an import of TensorFlow may lie between
)
_START = 0.25  # seconds until the package's own code runs; before, Python alone is there
_FILES = ("out.json", "initial.md", "initial.json", "initial.png")
_OUT = ".stdout"

Moment = tuple[str, str, float]
"""So many seconds after a file of the place contains a text; without a file, after the start."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What is interrupted.

    Attributes:
      arguments: of the command, for a place.
      phases: a file, a text in it that begins the phase, and the seconds that it takes on an idle machine.
      saves: whether a signal may save first, and end with status 75.
    """

    arguments: Callable[[Place], list[Any]]
    phases: tuple[Moment, ...]
    saves: bool = False

    def moments(self, count: int) -> Iterator[Moment]:
        """Spread over all phases evenly."""
        for i in range(count):
            file, text, seconds = self.phases[i % len(self.phases)]
            steps = -(-count // len(self.phases))
            yield file, text, seconds * (i // len(self.phases)) / steps + (0 if file else _START)


def _copy(place: Place) -> Path:
    return place.copy("finished")


def _sweep(place: Place, *flags: str) -> list[Any]:
    # Steps enough for a signal to meet them.
    flags = ("--config.steps=400", "--sweep=seed=0:2", *flags)
    return ["sweep", *TRAIN[1:], *flags, f"--workdir={place.path / 'run'}"]


_LOG = "run/seed=0/log.txt"

COMMANDS = {
    "train": Command(
        lambda place: [*TRAIN, f"--workdir={place.path / 'run'}"],
        (("", "", 4), (_OUT, "compiling", 3), (_OUT, "compiled", 1), (_OUT, "[", 0.5), (_OUT, "done:", 0.3)),
        saves=True,
    ),
    "evaluate": Command(
        lambda place: ["evaluate", f"--workdir={_copy(place)}", f"--json={place.path / 'out.json'}"],
        (("", "", 4),),
    ),
    "watch": Command(
        lambda place: ["evaluate", "--watch", "--poll=0.1", f"--workdir={place.path / 'later'}"],
        (("", "", 2), (_OUT, "waiting", 1)),
        saves=True,
    ),
    "watch of a run": Command(
        lambda place: ["evaluate", "--watch", "--poll=0.1", f"--workdir={_copy(place)}"],
        (("", "", 6),),
        saves=True,
    ),
    "report": Command(
        lambda place: ["report", _copy(place)],
        (("", "", 4),),
    ),
    "overview": Command(
        lambda place: ["overview", _DIGITS],
        (("", "", 3),),
    ),
    "init-report": Command(
        lambda place: ["init-report", _DIGITS, "--scales=0.1", "--seeds=1", f"--out={place.path / 'initial'}"],
        (("", "", 10),),
    ),
    "preflight": Command(
        lambda place: ["preflight", _DIGITS, "--topology=v5e:2x2", f"--json={place.path / 'out.json'}"],
        (("", "", 15),),
    ),
    "sweep": Command(
        lambda place: _sweep(place, "--jobs=2"),
        (("", "", 8), (_LOG, "compiling", 3), (_LOG, "compiled", 2), (_LOG, "done:", 0.5)),
        saves=True,
    ),
    "sweep on ray": Command(
        lambda place: _sweep(place, "--engine=ray", "--cpus=0.5"),
        (("", "", 12), (_LOG, "compiled", 2)),
        saves=True,
    ),
}


def signalled(place: Place, name: str, moment: Moment, *numbers: int) -> Ended:
    """Sends signals to a command at a moment, as a terminal does, and asserts that it obeys."""
    command, scratch = COMMANDS[name], place.path / "scratch"
    scratch.mkdir()
    with (place.path / _OUT).open("w") as out:
        process = place.start(
            *command.arguments(place),
            env={"TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp"},
            stdout=out,
            preexec_fn=_with_default_signals,
        )
    if _await(place, moment, process):
        _send(process, numbers)
    sent = time.monotonic()
    try:
        _, err = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        _kill_all(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        raise AssertionError(f"goes on after {signal.Signals(numbers[0]).name}: {err.strip()[-200:]!r}") from None
    ended = Ended(process.returncode, (place.path / _OUT).read_text(), err, time.monotonic() - sent)
    _assert_obeyed(place, name, ended, numbers)
    _assert_nothing_left(place, process.pid, scratch)
    return ended


def _await(place: Place, moment: Moment, process: Any) -> bool:
    """Whether the command still runs at that moment."""
    file, text, seconds = moment
    end = time.monotonic() + 240
    while file and process.poll() is None:
        path = place.path / file
        if path.exists() and text in path.read_text():
            break
        assert time.monotonic() < end, f"never says {text}"
        time.sleep(0.005)
    time.sleep(seconds)
    return process.poll() is None


def _send(process: Any, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        _kill_all(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        if len(numbers) > 1:
            time.sleep(0.3)


def _with_default_signals() -> None:
    """A shell in the background lets its children ignore some."""
    for number in _SAID:
        signal.signal(number, signal.SIG_DFL)


def _kill_all(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _assert_obeyed(place: Place, name: str, ended: Ended, numbers: tuple[int, ...]) -> None:
    ends = {128 + number: _SAID[number] for number in numbers}
    tidy(ended, *ends, *((75, 0) if COMMANDS[name].saves else (0,)))
    if ended.status in ends:
        said = ended.err.splitlines(keepends=True)
        if name == "preflight":  # which says there what it compiles
            said = said[-1:]
        assert said == [ends[ended.status]], f"said {ended.err!r}"
        left = [file for file in _FILES if (place.path / file).exists()]
        assert not left, f"half written: {left}"
    else:
        assert name == "preflight" or not ended.err, f"said {ended.err!r}"
    if name == "train" and ended.status == 75:
        assert "stopping: saved step" in ended.out, ended
    if name == "train" and ended.status == 0:
        assert (place.path / "run" / "result.json").exists(), "status 0 of a run that is not done"


def _assert_nothing_left(place: Place, session: int, scratch: Path) -> None:
    end = time.monotonic() + 10
    while (alive := list(_of_session(session))) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive, f"left running: {alive}"
    temporary = [*scratch.iterdir(), *place.path.rglob("*.partial")]
    assert not temporary, f"left behind: {[str(path.relative_to(place.path)) for path in temporary]}"


def _of_session(session: int) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                yield (folder / "cmdline").read_text().replace("\0", " ")[:80]


def _try(name: str, count: int, *numbers: int) -> None:
    signals = " and ".join("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name for number in numbers)
    for file, text, seconds in COMMANDS[name].moments(count):
        when = f"{seconds:.2f} s after {repr(text) if file else 'its start'}"
        KIND.tries[f"{signals} in {name} {when}"] = lambda place, moment=(file, text, seconds): signalled(
            place, name, moment, *numbers
        )


_try("train", 25, signal.SIGINT)
_try("train", 15, signal.SIGTERM)
_try("train", 5, signal.SIGHUP)
_try("train", 5, signal.SIGINT, signal.SIGINT)
_try("train", 5, signal.SIGTERM, signal.SIGINT)
for _name in sorted(COMMANDS.keys() - {"train"}):
    _try(_name, 8 if _name == "sweep" else 6, signal.SIGINT)
    _try(_name, 4 if _name == "sweep" else 2, signal.SIGTERM)


@KIND.attempts({name: name for name in ("report", "evaluate", "overview", "train")})
def the_reader_of_a_pipe_leaves(place: Place, name: str) -> None:
    process = place.start(*COMMANDS[name].arguments(place))
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    tidy(Ended(process.wait(120), "", err, 0))
    assert not err, err
    assert name != "train" or (place.path / "run" / "result.json").exists()


@KIND.attempts(
    {f"{name}, {number}": (name, number) for name in ("report", "evaluate", "overview", "train") for number in (0, 1, 2)}
)
def a_stream_is_closed_from_the_start(place: Place, name: str, number: int) -> None:
    ended = place.fresh(*COMMANDS[name].arguments(place), preexec_fn=lambda: os.close(number))
    tidy(ended)
    assert not ended.err, ended
