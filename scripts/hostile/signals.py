"""Ctrl-C, SIGTERM and SIGHUP at any moment of any command; pipes whose reader leaves; streams that are closed."""

import contextlib
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
_PATIENCE = 20  # seconds, on a busy machine, from a signal to the end; a step and a save may lie between
_RAY = {"RAY_TMPDIR": "/tmp"}  # its sockets have short names only


def _trained(place: Place) -> Path:
    return place.copy("finished")


COMMANDS: dict[str, tuple[Callable[[Place], list[Any]], float]] = {
    "train": (lambda place: [*TRAIN, f"--workdir={place.path / 'run'}"], 8),
    "evaluate": (lambda place: ["evaluate", f"--workdir={_trained(place)}", f"--json={place.path / 'out.json'}"], 3),
    "watch": (lambda place: ["evaluate", "--watch", "--poll=0.1", f"--workdir={place.path / 'later'}"], 4),
    "watch of a run": (lambda place: ["evaluate", "--watch", "--poll=0.1", f"--workdir={_trained(place)}"], 5),
    "report": (lambda place: ["report", _trained(place)], 3),
    "overview": (lambda place: ["overview", _DIGITS], 2),
    "init-report": (
        lambda place: ["init-report", _DIGITS, "--scales=0.1", "--seeds=1", f"--out={place.path / 'initial'}"], 9,
    ),
    "preflight": (
        lambda place: ["preflight", _DIGITS, "--topology=v5e:2x2", f"--json={place.path / 'out.json'}"], 14,
    ),
    "sweep": (lambda place: _sweep(place, "--jobs=2"), 14),
    "sweep on ray": (lambda place: _sweep(place, "--engine=ray"), 30),
}  # fmt: skip
"""Arguments, and the seconds that the command takes on an idle machine."""
_SAVING = ("train", "watch", "watch of a run", "sweep", "sweep on ray")
_FILES = ("out.json", "initial.md", "initial.png")


def _sweep(place: Place, *flags: str) -> list[Any]:
    return ["sweep", *TRAIN[1:], "--sweep=seed=0:2", f"--workdir={place.path / 'run'}", *flags]


def signalled(place: Place, command: str, seconds: float, *numbers: int, pause: float = 0.3) -> Ended:
    """Sends signals to a command so many seconds after its start, as a terminal does, and asserts that it obeys."""
    arguments, scratch = COMMANDS[command][0](place), place.path / "scratch"
    scratch.mkdir()
    first = numbers[0]
    process = place.start(*arguments, env={"TMPDIR": str(scratch), **_RAY}, preexec_fn=_default_signals)
    try:
        out, err = process.communicate(timeout=seconds)
        return tidy(Ended(process.returncode, out, err, seconds), 0)  # it was faster
    except subprocess.TimeoutExpired:
        pass
    sent = time.monotonic()
    for number in numbers:
        _kill_all(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        time.sleep(pause if len(numbers) > 1 else 0)
    try:
        out, err = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        _kill_all(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"goes on after {signal.Signals(first).name}: {(err or out).strip()[-200:]!r}") from None
    ended = Ended(process.returncode, out, err, time.monotonic() - sent)
    _assert_obeyed(place, command, ended, first)
    _assert_nothing_left(place, process.pid, scratch)
    return ended


def _default_signals() -> None:
    """What a shell in the background ignores, and its children with it."""
    for number in _SAID:
        signal.signal(number, signal.SIG_DFL)


def _kill_all(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _assert_obeyed(place: Place, command: str, ended: Ended, number: int) -> None:
    saves = (75, 0) if command in _SAVING else (0,)
    tidy(ended, 128 + number, *saves)
    if ended.status == 128 + number:
        assert ended.err in (_SAID[number], *_progress(command, ended, number)), f"said {ended.err!r}"
        left = [name for name in _FILES if (place.path / name).exists()]
        assert not left, f"half written: {left}"
    if ended.status == 75 and command == "train":
        assert "stopping: saved step" in ended.out, ended
    if ended.status == 0 and command == "train":
        assert (place.path / "run" / "result.json").exists(), "status 0 of a run that is not done"


def _progress(command: str, ended: Ended, number: int) -> Iterator[str]:
    """preflight says on stderr what it compiles."""
    if command == "preflight" and ended.err.endswith(_SAID[number]):
        before = ended.err.removesuffix(_SAID[number]).splitlines()
        if all(line.count(": ") >= 1 and not line.startswith("lowrank") for line in before):
            yield ended.err


def _assert_nothing_left(place: Place, session: int, scratch: Path) -> None:
    end = time.monotonic() + 10
    while (alive := list(_of_session(session))) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive, f"left running: {alive}"
    temporary = [str(path.relative_to(place.path)) for path in place.path.rglob("*.partial")] + [
        p.name for p in scratch.iterdir()
    ]
    assert not temporary, f"left behind: {temporary}"


def _of_session(session: int) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                yield (folder / "cmdline").read_text().replace("\0", " ")[:80]
        except OSError:
            continue


def moments(command: str, number: int) -> dict[str, float]:
    """So many moments of a command, from the first that its own code sees until after its end."""
    return {f"{i}/{number}": 0.25 + (COMMANDS[command][1] + 0.5) * i / number for i in range(number)}


def _try(command: str, count: int, *numbers: int) -> None:
    names = " and ".join("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name for number in numbers)
    for moment, seconds in moments(command, count).items():
        KIND.tries[f"{names} in {command} at {moment}"] = lambda place, seconds=seconds: signalled(
            place, command, seconds, *numbers
        )


_try("train", 24, signal.SIGINT)
_try("train", 12, signal.SIGTERM)
_try("train", 6, signal.SIGHUP)
_try("train", 6, signal.SIGINT, signal.SIGINT)
for _name in COMMANDS.keys() - {"train"}:
    _try(_name, 6, signal.SIGINT)
    _try(_name, 3, signal.SIGTERM)


@KIND.attempt
def sigterm_once_the_run_has_said_that_it_is_done(place: Place) -> None:
    process = place.start(*TRAIN, f"--workdir={place.path / 'run'}")
    while line := process.stdout.readline():
        if line.startswith("done:"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    tidy(Ended(process.returncode, out, err, 0), 0)


@KIND.attempts({name: name for name in ("report", "evaluate", "overview", "train")})
def the_reader_of_a_pipe_leaves(place: Place, command: str) -> None:
    process = place.start(*COMMANDS[command][0](place))
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    tidy(Ended(process.wait(60), "", err, 0))
    assert not err, err
    if command == "train":
        assert (place.path / "run" / "result.json").exists()


@KIND.attempts(
    {f"{name}, {number}": (name, number) for name in ("report", "evaluate", "overview", "train") for number in (0, 1, 2)}
)
def a_stream_is_closed_from_the_start(place: Place, command: str, number: int) -> None:
    ended = place.fresh(*COMMANDS[command][0](place), preexec_fn=lambda: os.close(number))
    tidy(ended)
    assert not ended.err, ended
