"""Evaluating the checkpoints of finished runs, of several at once, and of one that is still training."""

import json
import shutil
import signal
from typing import Any

import pytest

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.evaluation.evaluator import Evaluator, evaluate_all
from lowrank_jax.experiment.evaluation.results import Evaluation, Rows
from lowrank_jax.experiment.evaluation.watch import watch
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running

STEPS = (20, 40)
SMALL = {"model__kwargs": {"widths": (32,), "batch_norm": True}, "lowrank__method": "spectral", "dataset__mixup": 0.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train(running.config(**SMALL, eval__every="20 steps", checkpoint__every="20 steps"), str(folder))
    return folder


@pytest.fixture(scope="module")
def evaluator():
    """One for all tests that do not ask what it shares."""
    return Evaluator()


@pytest.fixture
def run(trained, tmp_path):
    """A copy to write to."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def final(folder):
    return json.loads((folder / "result.json").read_text())["eval"]


def watched(folder, name="watch_test.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def damage(folder):
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


def silent(_):
    pass


def test_what_cannot_be_evaluated_is_reported_and_the_rest_go_on(run, tmp_path, evaluator):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.json", tmp_path / "begun")
    workdirs = [str(tmp_path / name) for name in ("nowhere", "broken", "begun", "run")]
    said, complaints = [], []
    done = evaluate_all(workdirs, evaluator, "latest", say=said.append, complain=complaints.append)
    assert list(done) == [str(run)] and done[str(run)].step == 40
    assert [line.split()[:3] for line in said] == [["workdir", "split", "examples"], [str(run), "test", "360"]]
    for workdir, complaint in zip(workdirs, complaints, strict=False):
        assert complaint.count(workdir) == 1, complaint
    assert ["no config.json" in complaints[0], "damaged" in complaints[1], "no checkpoints" in complaints[2]] == [True] * 3


def test_what_runs_share_is_read_and_compiled_once(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    train(running.config(**SMALL, steps=10, optim__lr=0.1), str(other))
    reads, load = [], datasets.load
    monkeypatch.setattr(datasets, "load", lambda *args: reads.append(args) or load(*args))
    evaluator = Evaluator()
    results = [evaluator.evaluate(str(folder)) for folder in (run, other)]
    for folder, result in zip((run, other), results, strict=True):
        assert result.metrics == pytest.approx(final(folder), rel=1e-5)
    assert results[0].metrics != results[1].metrics
    assert len(reads) == 1
    assert evaluator.open(str(run)).eval_step is evaluator.open(str(other)).eval_step
    compiled: Any = evaluator.open(str(run)).eval_step
    assert compiled._cache_size() == 1


def test_runs_of_different_ranks_are_not_taken_for_each_other(run, tmp_path):
    train(running.config(**SMALL, steps=10, lowrank__scale=0.5), str(tmp_path / "wide"))
    evaluator = Evaluator()
    narrow, wide = evaluator.evaluate(str(run)), evaluator.evaluate(str(tmp_path / "wide"))
    assert narrow.params < wide.params
    assert wide.metrics == pytest.approx(final(tmp_path / "wide"), rel=1e-5)


def test_a_watch_evaluates_every_checkpoint_once(run, evaluator):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = []
    outcome = watch([str(run)], evaluator, poll=0.1, say=said.append, complain=said.append)
    assert (outcome.interrupted, outcome.failed) == (False, False)
    assert [line.split()[:2] for line in said] == [["split", "examples"], ["test", "360"], ["test", "360"]]
    assert [line["step"] for line in watched(run)] == [*STEPS]
    assert watched(run)[-1]["eval/top1"] == final(run)["top1"]
    assert list((run / "watch_test").glob("events.out.tfevents.*"))
    assert {path: path.read_bytes() for path in before} == before

    first = watched(run)[0]
    (run / "watch_test.jsonl").write_text(json.dumps(first) + '\n{"step": 40, "ev')  # killed in mid-line
    said.clear()
    watch([str(run)], evaluator, poll=0.1, say=said.append, complain=said.append)
    assert len(said) == 2 and [line["step"] for line in watched(run)] == [*STEPS]


def test_a_watch_of_a_run_that_diverged_ends(run, evaluator):
    (run / "result.json").unlink()
    Workdir(run).note_failure(diverged=True, reason="loss is nan")
    outcome = watch([str(run)], evaluator, poll=0.1, say=silent, complain=silent)
    assert not outcome.failed and [line["step"] for line in watched(run)] == [*STEPS]


def test_a_watch_of_another_split_has_a_file_of_its_own(run):
    outcome = watch([str(run)], Evaluator(split="train[:100]"), poll=0.1, say=silent, complain=silent)
    assert not outcome.failed and not (run / "watch_test.jsonl").exists()
    assert [line["eval/examples"] for line in watched(run, "watch_train%5B%3A100%5D.jsonl")] == [100, 100]


def test_a_watch_whose_folder_is_taken_says_so(run, evaluator):
    (run / "watch_test").touch()
    said = []
    outcome = watch([str(run)], evaluator, poll=0.1, say=silent, complain=said.append)
    assert outcome.failed and said == [f"{run}/watch_test is a file in the place of a folder; remove it"]


def test_a_watch_leaves_the_other_name_of_its_file_as_it_was(run, tmp_path, evaluator):
    (tmp_path / "outside").write_text('{"step": 20}\n')
    (run / "watch_test.jsonl").hardlink_to(tmp_path / "outside")
    watch([str(run)], evaluator, poll=0.1, say=silent, complain=silent)
    assert [line["step"] for line in watched(run)] == [*STEPS]
    assert (tmp_path / "outside").read_text() == '{"step": 20}\n'


def test_a_watch_reports_damage_at_the_second_look_and_goes_on(run, tmp_path, evaluator):
    damage(run / "checkpoints" / "20")
    (tmp_path / "file").write_text("")
    complaints = []
    outcome = watch([str(tmp_path / "file"), str(run)], evaluator, poll=0.1, say=silent, complain=complaints.append)
    assert (outcome.interrupted, outcome.failed) == (False, True)
    assert [line["step"] for line in watched(run)] == [40]
    assert len(complaints) == 2 and "is not a work directory" in complaints[0]
    assert complaints[1].startswith(f"{run}: checkpoint 20 cannot be used: ")


def test_a_watch_passes_over_a_step_that_is_deleted_while_it_is_read(run, monkeypatch, evaluator):
    from lowrank_jax.experiment.workdir.checkpoint import Checkpoints

    read = Checkpoints._read

    def too_late(self, step, target):
        if step == 20:
            shutil.rmtree(self.directory / "20")
        return read(self, step, target)

    monkeypatch.setattr(Checkpoints, "_read", too_late)
    complaints = []
    outcome = watch([str(run)], evaluator, poll=0.1, say=silent, complain=complaints.append)
    assert not outcome.failed and not complaints
    assert [line["step"] for line in watched(run)] == [40]


def test_a_watch_can_be_stopped_while_it_waits(tmp_path, unhandled_sigterm):
    said = []

    def say(text):
        said.append(text)
        signal.raise_signal(signal.SIGTERM)

    outcome = watch([str(tmp_path / "later")], Evaluator(), poll=600, say=say, complain=silent)
    assert outcome.interrupted and said == [f"waiting for {tmp_path / 'later'}"]


def test_a_watch_sees_a_run_begin_and_end(trained, tmp_path, evaluator):
    """What training does beside it is done whenever the watch says something."""
    run, said = tmp_path / "run", []

    def say(text):
        said.append(text)
        if text == f"waiting for {run}":
            shutil.copytree(trained, run, ignore=shutil.ignore_patterns("40", "result.json"))
        elif text.startswith("test"):
            shutil.copytree(trained / "checkpoints" / "40", run / "checkpoints" / "40", dirs_exist_ok=True)
            shutil.copy(trained / "result.json", run)

    outcome = watch([str(run)], evaluator, poll=0.1, say=say, complain=said.append)
    assert not outcome.failed and len(said) == 4
    assert [line["step"] for line in watched(run)] == [*STEPS]
    assert watched(run)[-1]["eval/top1"] == final(run)["top1"]


@pytest.mark.parametrize("gone", [True, False])  # whether the watch sees that nothing is there in between
def test_a_watch_begins_anew_with_a_run_that_takes_the_place_of_another(trained, tmp_path, monkeypatch, evaluator, gone):
    run, said, looks = tmp_path / "run", [], []
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("result.json"))
    train(running.config(**SMALL, seed=7, checkpoint__every="20 steps"), str(tmp_path / "other"))

    def sleep(seconds, stop):
        looks.append(seconds)
        if len(looks) == 1:
            shutil.rmtree(run)
        if len(looks) == (2 if gone else 1):
            shutil.copytree(tmp_path / "other", run)

    monkeypatch.setattr("lowrank_jax.experiment.evaluation.watch._sleep", sleep)
    outcome = watch([str(run)], evaluator, poll=0.1, say=said.append, complain=said.append)
    assert not outcome.failed
    assert f"{run} is gone; waiting for it" in said if gone else f"{run}: config.json has changed; looked at anew" in said
    assert [line["step"] for line in watched(run)] == [*STEPS]
    assert watched(run)[-1]["eval/top1"] == final(tmp_path / "other")["top1"] != final(trained)["top1"]


@pytest.mark.slow
def test_a_watch_beside_training_sees_it_begin_and_end(tmp_path):
    folder = tmp_path / "run"
    arguments = ["evaluate", f"--workdir={folder}", "--watch", "--poll=0.2"]
    every = {"steps": 1500, "checkpoint__every": "50 steps", "eval__every": "50 steps", "log__every": "500 steps"}
    with running.start([*running.command(folder)[:3], *arguments]) as watcher:
        assert watcher.stdout.readline() == f"waiting for {folder}\n"
        trained = running.run(running.command(folder, **every, checkpoint__keep=2))
        if trained.returncode:
            watcher.kill()  # it would wait for ever
        output = watcher.stdout.read()
    assert trained.returncode == 0, trained.stderr
    assert watcher.returncode == 0, output
    assert "damaged" not in output and "Traceback" not in output
    found = {line["step"]: line for line in watched(folder)}
    assert len(found) == len(watched(folder)) == len(output.splitlines()) - 1
    assert max(found) == 1500 and len(found) > 2  # it saw some on the way, not the last ones only
    for line in running.metrics(folder):
        if "eval/loss" in line and line["step"] in found:
            assert line["eval/loss"] == pytest.approx(found[line["step"]]["eval/loss"], rel=1e-5)
    assert not (folder / "damaged").exists()


def test_a_folder_whose_name_commands_a_terminal_is_a_row_like_others():
    said, names = [], ["a\n\x1b]0;owned\x07", "b"]
    rows = Rows(names, said.append)
    for name in names:
        rows.add(name, Evaluation("test", 1, {"top1": 0.5, "loss": 1.0, "examples": 2}, None, 1, 1, {}))
    assert [line.split("  ")[0] for line in said] == ["workdir", "a \\x1b]0;owned\\x07", "b"]
    assert len({line.index("test") for line in said[1:]}) == 1
    damaged = Evaluation("test", 1, {"top1": 0.5, "loss": 1.0, "examples": 2}, None, 1, 1, {2: "\x1b[2J"})
    assert "\x1b" not in damaged.table()
