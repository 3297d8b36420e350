"""Signals: a run's own, and those that are meant for the program around it."""

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from lowrank_jax.experiment.training.stop import Stalled, StopSignal
from tests import running


@pytest.fixture
def heard():
    """The signals that the program around it has heard; it handles SIGTERM and SIGINT itself."""
    numbers = []
    before = {n: signal.signal(n, lambda number, frame: numbers.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_a_request_and_by_default_nothing_else(heard, monkeypatch):
    """A handler of the program around, such as Ray's, may end it before the run is saved."""
    monkeypatch.setattr(StopSignal, "chained", False)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and not heard


def test_a_program_that_asks_for_it_hears_the_signal_too(heard):
    outer = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and heard == [signal.SIGTERM]
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and heard == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is outer


def test_a_program_without_handlers_of_its_own_is_not_ended(unhandled_sigterm):
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C would be: the request has been made
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_exception_of_the_program_around_ends_what_runs_inside():
    """How the tests themselves end on SIGTERM."""

    def handler(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit), StopSignal():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


ENDLESS = """
from lowrank_jax.experiment.training.loop import train
from tests import running

def test_endless(tmp_path):
    train(running.config(steps=10**6), str(tmp_path))

def test_next():
    print("goes on", flush=True)
"""


@pytest.mark.slow
def test_pytest_ends_when_it_is_told_to_while_a_run_is_under_way(tmp_path, repository):
    (tmp_path / "test_endless.py").write_text(ENDLESS)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-s", "-c", "/dev/null", f"--rootdir={tmp_path}"]
    # -m puts the working directory first on the path: that of the repository.
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_endless.py")]
    with running.start(command, devices=8, cwd=repository) as process:
        assert process.stdout is not None
        seen = ""
        while "[     10/" not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        process.send_signal(signal.SIGTERM)
        seen += process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM, seen
    assert "ended by SIGTERM" in seen and "goes on" not in seen


def test_a_stop_that_was_entered_already_puts_the_handlers_back_once(unhandled_sigterm):
    with StopSignal() as stop:
        with stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_stop_is_pickled_without_the_handlers_of_its_process():
    stop = StopSignal()
    stop.requested, stop._before = True, {15: threading.Lock()}
    assert pickle.loads(pickle.dumps(stop)).requested


def test_in_a_program_a_wait_for_data_ends_soon_after_a_request_and_nothing_else_does(unhandled_sigterm, monkeypatch):
    monkeypatch.setattr("lowrank_jax.experiment.training.stop._PATIENCE", 0.3)
    monkeypatch.setattr("lowrank_jax.experiment.training.stop._AGAIN", 0.1)
    began = time.monotonic()
    with StopSignal() as stop:
        with stop.waiting_for_data(saved=False):
            time.sleep(0.5)  # nobody has asked
        signal.raise_signal(signal.SIGTERM)
        with stop.waiting_for_data(saved=False):
            pass
        time.sleep(0.6)  # a step that takes long
        with pytest.raises(Stalled, match="no data came for 0s"), stop.waiting_for_data(saved=True):
            threading.Event().wait(60)
        lost = 0
        with stop.waiting_for_data(saved=True):
            while lost < 3:  # as where it is raised in a callback
                try:
                    time.sleep(60)
                except Stalled:
                    lost += 1
        with pytest.raises(KeyboardInterrupt) as second, stop.waiting_for_data(saved=True):
            signal.raise_signal(signal.SIGINT)
        assert not isinstance(second.value, Stalled) and stop.requested
    assert time.monotonic() < began + 30 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


STALLING = '''
import pathlib, time
import numpy as np
from lowrank_jax.experiment.data.own import Data

class Photographs:
    """Of many sizes, so that they are read as they are needed; after a while the disk stalls."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        while pathlib.Path(__file__).with_name("stalled").exists():
            time.sleep(0.1)
        return np.full((8 + index % 2, 9, 3), index % 3 * 80, np.uint8), index % 3

def splits():
    return Data({"train": Photographs(48), "test": Photographs(12)}, num_classes=3)
'''


@pytest.mark.slow
def test_a_batch_that_never_comes_does_not_keep_a_run_from_ending(tmp_path):
    (tmp_path / "stalling.py").write_text(STALLING)
    changes = {
        "dataset__name": "stalling:splits", "dataset__image_size": 8, "dataset__crop_padding": 0, "code_dir": str(tmp_path),
        "objective__metrics": "('top1',)", "steps": 2000, "checkpoint__every": "5 steps", "eval__every": "2000 steps",
    }  # fmt: skip
    command = running.command(tmp_path / "run", **changes)
    with running.start(command) as process:
        said = []
        while "saved@" not in "".join(said):
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)
        (tmp_path / "stalled").touch()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in output, output
    assert re.search(r"lowrank: no batch of data came for \d+s; ended without saving, and the same command goes on", output)
    (tmp_path / "stalled").unlink()
    with running.start(command) as process:
        while "resuming" not in (line := process.stdout.readline()):
            assert line
        while "saved@" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command continues it" in output


@pytest.mark.slow
@pytest.mark.parametrize(("make", "number"), [(os.pipe, signal.SIGTERM), (os.openpty, signal.SIGINT)])
def test_output_that_nobody_reads_does_not_keep_a_run_from_being_saved(tmp_path, make, number):
    changes = {"steps": 10**6, "log__every": "1 steps", "checkpoint__every": f"{10**6} steps"}
    ours, theirs = make()
    command = running.command(tmp_path, **changes)
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=running.environment(1))
    os.close(theirs)
    with process:
        try:
            before, size = -1, 0
            while before != size or not size:  # until it waits for whoever would read
                time.sleep(2)
                assert process.poll() is None
                metrics = tmp_path / "metrics.jsonl"
                before, size = size, metrics.stat().st_size if metrics.exists() else 0
            began = time.monotonic()
            process.send_signal(number)
            assert process.wait(60) == 75 and time.monotonic() - began < 15
        finally:
            process.kill()
            os.close(ours)
    (saved,) = (tmp_path / "checkpoints").glob("[0-9]*")
    with running.start(command) as process:
        while "resuming" not in (line := process.stdout.readline()):
            assert line
        process.kill()
    assert saved.name in line
