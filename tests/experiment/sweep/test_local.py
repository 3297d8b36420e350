"""Sweeps on this machine: what becomes of a trial, and, slow, real processes that are killed with real signals."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import time
import types

import pytest
from rich.console import Console

from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.cli.output import say
from lowrank_jax.experiment.sweep import launch, local
from lowrank_jax.experiment.sweep.trials import Outcome, Trial
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running, stored

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


# --- what becomes of a trial, without its process ---


def trial(folder, name="seed=0"):
    (folder / name).mkdir(parents=True)
    return Trial(name, {}, running.config(), str(folder / name), ("train",))


def engine_of(*trials, jobs=1):
    return local._Engine(trials, jobs, commands.main)


def end(engine, trial, status, tries=1):
    """Tells an engine that a trial's process has ended."""
    engine._ended(local._Running(trial, types.SimpleNamespace(exitcode=status), tries, time.monotonic()))


@pytest.mark.parametrize(
    ("status", "tries", "outcome"),
    [
        (0, 1, "done"),
        (4, 1, "diverged"),  # it would only diverge again
        (2, 1, "failed"),  # so would what cannot be used
        (1, 1, None),  # tried once more
        (-9, 1, None),
        (1, 2, "failed"),
        (-9, 2, "failed"),
    ],
)
def test_what_becomes_of_a_trial_by_the_status_of_its_process(tmp_path, capsys, status, tries, outcome):
    one = trial(tmp_path)
    engine = engine_of(one)
    assert engine.waiting == [(one, 1)]
    engine.waiting.clear()
    folder = Workdir(one.workdir)
    if status == 0:
        folder.write_json("result.json", stored.result(0.75))
    if status == 4:
        folder.note_failure(diverged=True, reason="loss is nan at step 3")
    if status == 2:
        (tmp_path / one.name / "log.txt").write_text("begun\n\nno such data\n\n")
    end(engine, one, status, tries)

    said = capsys.readouterr().out
    if outcome is None:
        assert engine.waiting == [(one, 2)] and not engine.outcomes and "seed=0" in said
        return
    reason = {0: "", 4: "loss is nan at step 3", 2: "no such data", 1: "exited with status 1", -9: "killed by SIGKILL"}[status]
    assert not engine.waiting and engine.outcomes == {"seed=0": Outcome(outcome, reason)}
    assert said.startswith(f"[1/1] {outcome}") and ("top1 0.7500" if status == 0 else reason) in said
    if outcome == "failed":
        assert folder.read_json("failure.json") == {"status": "failed", "reason": reason}


def test_the_fork_server_finds_what_it_preloads():
    """It ignores modules that it does not find, and the first trial would import them anew, as would each after it."""
    specs = [importlib.util.find_spec(name) for name in local.PRELOADED]
    assert all(specs) and "def train(" in pathlib.Path(specs[0].origin).read_text()


def test_what_ends_after_a_signal_is_interrupted_and_what_has_ended_is_not_run(tmp_path):
    done, diverged, stopped = (trial(tmp_path, name) for name in ("done", "diverged", "stopped"))
    Workdir(done.workdir).write_json("result.json", stored.result())
    Workdir(diverged.workdir).note_failure(diverged=True, reason="why")
    engine = engine_of(done, diverged, stopped, jobs=2)
    assert engine.waiting == [(stopped, 1)]
    engine.waiting.clear()
    engine.stopping = True
    end(engine, stopped, 75)
    assert {name: outcome.status for name, outcome in engine.outcomes.items()} == {
        "done": "done", "diverged": "diverged", "stopped": "interrupted",
    }  # fmt: skip


@pytest.mark.parametrize("lock", [".lock", ".sweep.lock"])
def test_a_trial_that_another_process_trains_in_is_left_alone(tmp_path, monkeypatch, lock):
    monkeypatch.setattr(local, "_ENDING_SECONDS", 0.1)
    one, after = trial(tmp_path, "one"), trial(tmp_path, "after")
    engine = engine_of(one, after)
    with Workdir(one.workdir).locked(name=lock), Workdir(after.workdir).locked(name=lock):
        engine._start(*engine.waiting.pop(0))
        engine.waiting.clear()
        end(engine, after, 2)  # another took it when this had started
    assert not engine.running and engine.outcomes == dict.fromkeys(["one", "after"], local._ELSEWHERE)
    for each in (one, after):
        assert {file.name for file in pathlib.Path(each.workdir).iterdir()} <= {".lock", ".sweep.lock"}


def test_a_trial_is_kept_from_other_sweeps_while_it_runs(tmp_path):
    one, held = trial(tmp_path), contextlib.ExitStack()
    assert local._take(one, held) and local._elsewhere(one)
    held.close()
    assert not local._elsewhere(one)


def test_the_table_says_what_runs_and_what_its_trial_says(tmp_path):
    running_, waiting = trial(tmp_path, "lr=[0.1]"), trial(tmp_path, "waits")
    (tmp_path / "lr=[0.1]" / "log.txt").write_text("begun\n[     10/2000] loss 1.5\n")
    engine = engine_of(running_, waiting)
    engine.waiting.pop(0)
    engine.running.append(local._Running(running_, None, 1, time.monotonic()))
    console = Console(file=io.StringIO(), width=120)
    console.print(engine.board._picture())
    text = console.file.getvalue()
    assert "0 done, 1 running, 0 failed, 1 waiting, 2 in total" in text and "eta ..." in text
    assert re.search(r"lr=\[0\.1\] +\d+s +\[ +10/2000\] loss 1\.5", text)


def test_a_reason_commands_no_terminal(tmp_path, capsys):
    one = trial(tmp_path)
    (tmp_path / one.name / "log.txt").write_text("\x1b]0;owned\x07\n")
    engine = engine_of(one)
    console = Console(file=io.StringIO(), width=120)
    engine.running.append(local._Running(one, None, 1, time.monotonic()))
    console.print(engine.board._picture())
    end(engine, one, 2)
    say(launch.summary(engine.outcomes))
    said = capsys.readouterr().out
    for text in (said, console.file.getvalue()):
        assert "\\x1b]0;owned\\x07" in text and "\x1b" not in text and "\x07" not in text
    assert said.count("owned") == 2


def test_a_log_that_becomes_a_pipe_blocks_nothing(tmp_path):
    one = trial(tmp_path)
    os.mkfifo(tmp_path / one.name / "log.txt")
    assert local._last_line(one) == ""
    with pytest.raises(OSError, match=r"log\.txt"):
        local._train(commands.main, [], str(tmp_path / one.name / "log.txt"))


def lowrank(arguments):
    """The command in this process; returns its status."""
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments[3:])
    return ended.value.code


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lowrank.scael=1", "did you mean lowrank.scale?"),
        ("seed", "expected key=value"),
        ("seed=0:2", "'0' must be a whole"),
    ],
)
def test_mistakes_start_nothing(tmp_path, capsys, text, message):
    status = lowrank(sweep(tmp_path / "w", text, *(["--jobs=0"] if "0:2" in text else [])))
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_dry_run_prints_the_trials_and_starts_nothing(tmp_path, capsys):
    text = "lowrank.scale=0.1,0.25; lowrank.method=none,spectral; seed=0:2"
    assert lowrank(sweep(tmp_path / "w", text, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "6 trials" and "scale=0.25,method=spectral,seed=1" in said
    assert not (tmp_path / "w").exists()


# --- real processes ---


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


def wait_until(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.stdout.read())
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_divergence_and_does_not_repeat_what_is_done(tmp_path):
    command = sweep(tmp_path, "optim.lr=0.1,1e30; seed=0", "--jobs=2")
    first = running.run(command)
    assert first.returncode == 1, first.stdout + first.stderr
    assert set(results(tmp_path)) == {"lr=0.1,seed=0"}
    assert "1 done" in first.stdout and "1 diverged" in first.stdout
    assert "retrying" not in first.stdout  # it would only diverge again
    failure = json.loads((tmp_path / "lr=1e30,seed=0" / "failure.json").read_text())
    assert failure["status"] == "diverged" and "learning rate" in failure["reason"]
    assert "compiling the training step" in (tmp_path / "lr=0.1,seed=0" / "log.txt").read_text()

    written = {name: (tmp_path / name / "result.json").stat().st_mtime_ns for name in results(tmp_path)}
    again = running.run(command)
    assert again.returncode == 1 and "1 done" in again.stdout and "1 diverged" in again.stdout
    assert written == {name: (tmp_path / name / "result.json").stat().st_mtime_ns for name in results(tmp_path)}


@pytest.mark.slow
def test_a_killed_trial_is_tried_once_more_and_an_interrupted_sweep_goes_on(tmp_path):
    command = sweep(tmp_path, "seed=0:2", "--config.checkpoint.every=200 steps", steps=10_000_000)
    with started(command) as process:
        log = tmp_path / "seed=0" / "log.txt"
        wait_until(lambda: log.exists() and "saved@1000" in log.read_text(), process)
        child = next(pid for pid in descendants(process.pid) if str(log) in open_files(pid))
        os.kill(child, signal.SIGKILL)
        # Once it trains: before, there is nothing to save that is not saved.
        wait_until(lambda: "[" in log.read_text().partition("resuming")[2], process)
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert process.returncode == 75, output
    assert "killed by SIGKILL; retrying: seed=0" in output
    assert "2 interrupted" in output and "stopping: saved step" in log.read_text()
    assert not descendants(process.pid)

    (tmp_path / "backup").hardlink_to(log)  # as `cp -al` makes one
    backed_up = log.read_text()
    # The rest of it is long; that the same command goes on is enough.
    with started(command) as process:
        wait_until(lambda: log.read_text().count("resuming") == 2, process)
        process.kill()
    assert (tmp_path / "backup").read_text() == backed_up
    end = time.monotonic() + 30
    while any(str(log) in open_files(pid) for pid in all_pids()):
        assert time.monotonic() < end, "a trial outlived its sweep"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_terminal_shows_what_runs(tmp_path):
    master, slave = pty.openpty()
    command = sweep(tmp_path, "seed=0:1", steps=1000)
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
    assert "0 done, 1 running, 0 failed, 0 waiting, 1 in total" in text and "eta" in text
    assert re.search(r"seed=0 +\d+s +\[ *\d+/1000", text)  # the last line of the trial's own output
    assert "[1/1] done" in text


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
