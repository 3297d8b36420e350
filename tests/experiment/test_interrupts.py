"""Signals to real processes that import nothing heavy: what a command does in its worst moments."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.errors import MEANINGS
from tests import running

START = """
import os, signal, sys, threading, time
from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.training.stop import StopSignal

def ready():
    print("ready", flush=True)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have been started by nohup
interrupts.obey()
"""

# Holds the lock that all threads need until it ends, which is minutes away; only its own thread hears of signals meanwhile.
IN_A_REGULAR_EXPRESSION = "import re; ready(); re.match('(a*)*b', 'a' * 40)"

# Another thread hears of the signal first, and is about to act while this one goes on.
HEARD_ELSEWHERE = """
read = os.read
def read_slowly(*args):
    time.sleep(0.5)
    return read(*args)
os.read = read_slowly
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
ready()
time.sleep(0.2)
import re; re.match('(a*)*b', 'a' * 40)
"""

# Python's own code does not run again before the end, which is minutes away.
IN_C = "ready(); import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def start(code):
    code = START + textwrap.dedent(code)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=running.ROOT, **pipes)


def signalled(code, *numbers):
    """Status, output and errors of a program that is sent a signal each time it says that it is ready."""
    with start(code) as process:
        said = ""
        for number in numbers:
            while (line := process.stdout.readline()) != "ready\n":
                assert line, process.stderr.read()
                said += line
            process.send_signal(number)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, said + out, err


INTERRUPTED = (130, "", "lowrank: interrupted\n")


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_ends_a_command_with_one_line_and_a_documented_status(number):
    status, out, err = signalled("ready(); time.sleep(60)", number)
    assert (status, out, err) == (128 + number, "", f"lowrank: {interrupts.SIGNALS[number]}\n")
    assert status in MEANINGS


@pytest.mark.parametrize(
    "code",
    [
        IN_C,
        IN_A_REGULAR_EXPRESSION,
        HEARD_ELSEWHERE,
        """
        class Lost:
            def __del__(self):
                for _ in range(1000):  # an exception in here is ignored
                    pass

        ready()
        while True:
            Lost()
        """,
        """
        def forever():
            try:
                while True:
                    time.sleep(1)
            except BaseException:
                forever()

        ready()
        forever()
        """,
    ],
    ids=["in C", "in a regular expression", "heard elsewhere", "in a destructor", "where all exceptions are caught"],
)
def test_nothing_keeps_a_command_from_ending(code):
    assert signalled(code, signal.SIGINT) == INTERRUPTED


RECEIVED = """
with StopSignal() as stop:
    ready()
    while not stop.requested:
        time.sleep(0.01)
    print("saved", flush=True)
"""


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_run_that_can_be_saved_takes_a_signal(number):
    assert signalled(RECEIVED, number) == (0, "saved\n", "")


def test_what_comes_once_a_run_is_saved_is_too_late_but_for_ctrl_c():
    assert signalled(f"{RECEIVED}\nready(); time.sleep(0.3)", signal.SIGINT, signal.SIGTERM) == (0, "saved\n", "")
    assert signalled(f"{RECEIVED}\nready(); time.sleep(60)", signal.SIGTERM, signal.SIGINT) == (130, "saved\n", INTERRUPTED[2])
    code = "interrupts.too_late(); import atexit; atexit.register(lambda: (ready(), time.sleep(0.3))); sys.exit(4)"
    assert signalled(code, signal.SIGTERM) == (4, "", "")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_request_ends_at_once_even_in_c(first):
    code = f"""
    stop = StopSignal()
    stop.__enter__()
    ready()
    while not stop.requested:
        time.sleep(0.01)
    {IN_C}  # as in a step that takes long
    """
    assert signalled(code, first, signal.SIGINT) == INTERRUPTED


def test_a_request_is_heard_in_c():
    code = f"""
    stop = StopSignal()
    stop.__enter__()
    def heard():
        while not stop.requested:
            time.sleep(0.01)
        print("heard", flush=True)
        os._exit(0)
    threading.Thread(target=heard).start()
    {IN_C}
    """
    assert signalled(code, signal.SIGTERM) == (0, "heard\n", "")


def test_what_must_not_be_left_behind_is_removed(tmp_path):
    kept, removed = tmp_path / "kept", tmp_path / "removed"
    code = f"""
    import pathlib
    from lowrank_jax.experiment import temporary
    kept, removed = pathlib.Path({str(kept)!r}), pathlib.Path({str(removed)!r})
    with interrupts.cleaning_up(kept.unlink):
        kept.touch()
    with interrupts.cleaning_up(removed.unlink), interrupts.cleaning_up(lambda: 1 / 0), temporary.folder("lowrank_") as folder:
        removed.touch()
        print(folder, flush=True)
        {IN_C}
    """
    with start(code) as process:
        folder = process.stdout.readline().strip()
        assert os.path.isdir(folder) and process.stdout.readline() == "ready\n"  # noqa: PTH112
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read()) == (130, INTERRUPTED[2])
    assert kept.exists() and not removed.exists() and not os.path.exists(folder)  # noqa: PTH110


def test_short_work_is_completed():
    code = """
    with interrupts.held_back():
        ready()
        time.sleep(0.3)
        print("complete", flush=True)
    time.sleep(60)
    """
    assert signalled(code, signal.SIGINT) == (130, "complete\n", INTERRUPTED[2])


def test_processes_of_one_run_end_in_their_own_way():
    code = """
    interrupts.leave_by(lambda status, message: (print(status, message, flush=True), os._exit(7)))
    ready(); time.sleep(60)
    """
    assert signalled(code, signal.SIGTERM) == (7, "143 lowrank: ended by SIGTERM\n", "")


def test_signals_of_a_fork_are_its_own():
    code = """
    with interrupts.cleaning_up(lambda: print("cleaned", flush=True)):
        child = os.fork()
        if not child:
            time.sleep(60)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        ready()
        time.sleep(60)
    """
    with start(code) as process:
        assert process.stdout.readline() == f"{-signal.SIGTERM}\n"
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("cleaned\n", INTERRUPTED[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_waits_for_threads_left_behind_ends_with_the_status_that_it_has(number):
    code = """
    threading.Thread(target=time.sleep, args=(1000,)).start()
    interrupts.too_late(3)
    ready()
    sys.exit(3)
    """
    assert signalled(code, number) == (3, "", "")


def test_nohup_is_respected():
    code = """
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)
    print(stop.requested)
    """
    code = START.replace("interrupts.obey()", "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{}") + textwrap.dedent(code)
    for way in ("interrupts.obey()", ""):  # a command, and another program
        done = subprocess.run(
            [sys.executable, "-c", code.format(way)], capture_output=True, text=True, cwd=running.ROOT, check=False
        )
        assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_library_that_takes_a_signal_gives_it_back():
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)); interrupts.install(); ready(); time.sleep(60)"
    assert signalled(code, signal.SIGTERM)[0] == 143
    code = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)){RECEIVED}"
    assert signalled(code, signal.SIGTERM) == (0, "saved\n", "")


UNREAD = """
from lowrank_jax.experiment import streams
streams._UNREAD = 0.5
streams.keep_open()

def ready():
    os.write({other}, b"ready\\n")

os.set_blocking({unread}, False)
try:
    while True:
        os.write({unread}, b"x" * 4096)  # as a run has said much
except BlockingIOError:
    os.set_blocking({unread}, True)
"""


def unread(code, number, stream="stdout"):
    """Status of a program of which nobody reads one stream, and what it says on the other."""
    numbers = {"stdout": 1, "stderr": 2}
    (other,) = numbers.keys() - {stream}
    code = START + UNREAD.format(unread=numbers[stream], other=numbers[other]) + textwrap.dedent(code)
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=running.ROOT, text=True, **{stream: writing, other: subprocess.PIPE}
    ) as process:
        os.close(writing)
        try:
            heard = getattr(process, other)
            assert heard.readline() == "ready\n"
            time.sleep(0.3)
            process.send_signal(number)
            status = process.wait(30)
            return status, heard.read()
        finally:
            process.kill()
            os.close(reading)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_output_that_nobody_reads_does_not_keep_a_run_from_being_saved(number, tmp_path):
    code = f"""
    import pathlib
    with StopSignal() as stop:
        ready()
        while not stop.requested:
            print("x" * 100, flush=True)
        pathlib.Path({str(tmp_path / "saved")!r}).touch()
    """
    assert unread(code, number) == (0, "")
    assert (tmp_path / "saved").exists()


def test_output_that_nobody_reads_does_not_keep_a_command_from_ending():
    # In its last words, on either stream, and where the status stands already.
    assert unread("ready(); time.sleep(60)", signal.SIGTERM, "stderr") == (143, "")
    assert unread("ready(); print('x' * 10**6, flush=True)", signal.SIGINT) == (130, INTERRUPTED[2])
    assert unread("interrupts.too_late(); ready(); print('x' * 10**6, flush=True); sys.exit(4)", signal.SIGTERM) == (4, "")
    assert unread("interrupts.too_late(); ready(); print('x'); sys.exit(4)", signal.SIGTERM) == (4, "")
    code = """
    def complain():
        print("x" * 10**6, file=sys.stderr)
    threading.Thread(target=complain).start()  # which has the stream
    ready()
    with StopSignal():
        time.sleep(0.5)
        print("x", file=sys.stderr)
    """
    assert unread(code, signal.SIGTERM, "stderr") == (0, "")
