"""Sweeps as a user runs them: real processes, killed with real signals."""

import contextlib
import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import running

BASE = [
    "--config.model.name=mlp",
    "--config.model.kwargs={'widths': (16,)}",
    "--config.lowrank.rules=()",
    "--config.epochs=none",
]
EVERY = ["--config.eval.every=1000 steps", "--config.optim.warmup=5 steps"]


def sweep(workdir, text, *flags, steps=20):
    file = running.ROOT / "configs" / "digits_resnet.py"
    given = [f"--config={file}", f"--workdir={workdir}", f"--sweep={text}", f"--config.steps={steps}", *BASE, *EVERY, *flags]
    return [sys.executable, "-m", "lowrank_jax", "sweep", *given]


def results(workdir):
    return {file.parent.name: json.loads(file.read_text()) for file in workdir.glob("*/result.json")}


@contextlib.contextmanager
def started(command):
    """A process that a failing test does not wait for."""
    with running.start(command) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.stdout.read())
        time.sleep(0.05)


def test_a_sweep_goes_on_past_a_divergence_and_does_not_repeat_what_is_done(tmp_path):
    command = sweep(tmp_path, "optim.lr=0.1,1e30; seed=0:2", "--jobs=2")
    first = running.run(command)
    assert first.returncode == 1, first.stdout + first.stderr
    assert set(results(tmp_path)) == {"lr=0.1,seed=0", "lr=0.1,seed=1"}
    assert "2 done, 2 diverged" in first.stdout
    assert "trying once more" not in first.stdout  # it would only diverge again
    failure = json.loads((tmp_path / "lr=1e30,seed=0" / "failure.json").read_text())
    assert failure["status"] == "diverged" and "learning rate" in failure["reason"]
    assert "compiling the training step" in (tmp_path / "lr=0.1,seed=0" / "log.txt").read_text()

    written = {name: (tmp_path / name / "result.json").stat().st_mtime_ns for name in results(tmp_path)}
    again = running.run(command)
    assert again.returncode == 1 and "2 done, 2 diverged" in again.stdout
    assert written == {name: (tmp_path / name / "result.json").stat().st_mtime_ns for name in results(tmp_path)}


def test_a_killed_trial_is_tried_once_more_and_an_interrupted_sweep_goes_on(tmp_path):
    command = sweep(tmp_path, "seed=0:2", "--config.checkpoint.every=200 steps", steps=10_000_000)
    with started(command) as process:
        log = tmp_path / "seed=0" / "log.txt"
        wait_until(lambda: log.exists() and "saved@1000" in log.read_text(), process)
        child = next(pid for pid in descendants(process.pid) if str(log) in open_files(pid))
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: "resuming" in log.read_text(), process)
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert process.returncode == 75, output
    assert "killed by SIGKILL; trying once more: seed=0" in output
    assert "2 interrupted" in output and "stopping: saved step" in log.read_text()
    assert not descendants(process.pid)

    # The rest of it is long; that the same command goes on is enough.
    with started(command) as process:
        wait_until(lambda: log.read_text().count("resuming") == 2, process)
        process.kill()
    end = time.monotonic() + 30
    while any(str(log) in open_files(pid) for pid in all_pids()):
        assert time.monotonic() < end, "a trial outlived its sweep"
        time.sleep(0.1)


def test_a_terminal_shows_what_runs(tmp_path):
    master, slave = pty.openpty()
    command = sweep(tmp_path, "seed=0:1", steps=2000)
    environment = {**running.environment(1), "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # that is how a terminal ends
            while part := os.read(master, 4096):
                seen += part
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert process.returncode == 0, text
    assert "0 done, 1 running, 0 failed, 0 waiting of 1" in text and "eta" in text
    assert re.search(r"seed=0 +\d+s +\[ *\d+/2000", text)  # the last line of the trial's own output
    assert "[1/1] done" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lowrank.scael=1", "did you mean lowrank.scale?"),
        ("seed", "not of the form key=value"),
        ("seed=0:2", "'0' must be a whole"),
    ],
)
def test_mistakes_start_nothing(tmp_path, text, message):
    result = running.run(sweep(tmp_path / "w", text, *(["--jobs=0"] if "0:2" in text else [])))
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "w").exists()


def test_a_dry_run_prints_the_trials_and_starts_nothing(tmp_path):
    text = "lowrank.scale=0.1,0.25; lowrank.method=none,spectral; seed=0:2"
    result = running.run(sweep(tmp_path / "w", text, "--dry-run"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "6 trials" and "scale=0.25,method=spectral,seed=1" in result.stdout
    assert not (tmp_path / "w").exists()


def all_pids():
    return [int(entry.name) for entry in pathlib.Path("/proc").iterdir() if entry.name.isdecimal()]


def descendants(ancestor):
    parents = {}
    for pid in all_pids():
        try:
            parents[pid] = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, generation = [], [ancestor]
    while generation:
        generation = [pid for pid, parent in parents.items() if parent in generation]
        found += generation
    return found


def open_files(pid):
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                found.append(str(entry.readlink()))
    return found
