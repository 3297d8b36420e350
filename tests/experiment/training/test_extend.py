"""A run that is trained for longer is the run that was as long from its start, but for the schedule until then."""

import json
import shutil

import numpy as np
import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config import ConfigError
from lowrank_jax.experiment.errors import CheckpointError, WorkdirError
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.report.page import Report
from lowrank_jax.experiment.report.stored_runs import read
from lowrank_jax.experiment.training.build import build
from lowrank_jax.experiment.training.extend import extended
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.digest import digests
from lowrank_jax.experiment.workdir.identity import config_digest, digest_of, earlier_digests
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

SMALL = {"eval__every": "10 steps", "checkpoint__every": "10 steps", "checkpoint__keep": 9}


def config(steps, **changes):
    return running.config(steps=steps, **SMALL, **changes)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    train(config(20), str(folder))
    return folder


@pytest.fixture
def folder(short, tmp_path):
    """A copy of a run of 20 steps that has finished."""
    return shutil.copytree(short, tmp_path / "run")


def result(folder):
    return json.loads((folder / "result.json").read_text())


def losses(folder):
    return {line["step"]: line["train/loss"] for line in running.metrics(folder) if "train/loss" in line}


@pytest.mark.parametrize("how", ["restart", "constant"])
def test_an_extended_run_is_the_one_that_was_as_long_from_its_start(folder, short, tmp_path, how, capsys):
    longer = train(config(40), str(folder), extend=True, schedule=how)
    said = capsys.readouterr().out
    assert "extended from 20 steps to 40 steps, steps 20 to 40: " in said and f"resuming {folder} from step 20" in said
    at_once = train(config(40, extensions=(("20 steps", how),)), str(tmp_path / "at once"))
    assert digests(longer.state) == digests(at_once.state)
    assert losses(folder) == losses(tmp_path / "at once") and sorted(losses(folder)) == [10, 20, 30, 40]
    assert losses(short).items() <= losses(folder).items()
    plain = train(config(40), str(tmp_path / "plain"))
    assert digests(plain.state) != digests(longer.state)  # its schedule came down later


def test_both_lengths_are_in_the_result_and_the_first_result_is_kept(folder, short):
    train(config(40), str(folder), extend=True)
    assert result(folder)["step"] == 40 and result(folder)["phases"] == [
        {"length": "20 steps", "step": 20, "schedule": "cosine"},
        {"length": "40 steps", "step": 40, "schedule": "restart"},
    ]
    assert json.loads((folder / "result-1.json").read_text()) == result(short)
    assert result(short)["phases"] == [{"length": "20 steps", "step": 20, "schedule": "cosine"}]
    assert read(folder, "run").status == "done"


@pytest.mark.parametrize("how", ["restart", "constant"])
def test_it_is_resumed_exactly_by_the_same_command(folder, tmp_path, how, capsys):
    interrupted, whole = folder, shutil.copytree(folder, tmp_path / "whole")
    expected = train(config(40), str(whole), extend=True, schedule=how)
    stop = running.Stop()

    def on_evaluation(step, evaluated):
        stop.requested = step == 30

    assert train(config(40), str(interrupted), extend=True, schedule=how, stop=stop, on_evaluation=on_evaluation).interrupted
    assert not (interrupted / "result.json").exists() and read(interrupted, "run").status == "unfinished"
    capsys.readouterr()
    again = train(config(40), str(interrupted), extend=True)
    assert f"resuming {interrupted} from step 30" in capsys.readouterr().out
    assert digests(again.state) == digests(expected.state) and losses(interrupted) == losses(whole)
    assert result(interrupted)["phases"] == result(whole)["phases"]
    train(config(40), str(interrupted), extend=True, schedule=how)
    assert "has finished: step 40 of 40" in capsys.readouterr().out


def test_a_kill_before_the_old_result_was_set_aside_does_no_harm(folder):
    longer = extended(config(40), str(folder))
    (folder / "config.json").write_text(json.dumps(configs.to_dict(longer)))
    train(config(40), str(folder), extend=True)
    assert result(folder)["step"] == 40 and (folder / "result-1.json").exists()


def test_a_run_that_has_not_finished_goes_on_to_its_end_first(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "whole")
    shutil.rmtree(folder / "checkpoints" / "20")
    (folder / "result.json").unlink()
    runs = [train(config(40), str(path), extend=True) for path in (folder, tmp_path / "whole")]
    assert digests(runs[0].state) == digests(runs[1].state)


def test_it_is_extended_again(folder):
    for steps, how in ((30, "restart"), (40, "constant")):
        train(config(steps), str(folder), extend=True, schedule=how)
    assert [phase["step"] for phase in result(folder)["phases"]] == [20, 30, 40]
    rates = {line["step"]: line["train/lr"] for line in running.metrics(folder) if "train/lr" in line}
    schedule, _ = build(extended(config(40), str(folder))).make_optimizer(0.05)
    # The mean rate of the ten steps until each log, the last ten at that of step 30.
    for step, rate in rates.items():
        np.testing.assert_allclose(rate, np.mean([schedule(t) for t in range(step - 10, step)]), rtol=1e-5)
    np.testing.assert_allclose([schedule(t) for t in range(30, 40)], schedule(29))
    assert len(list(folder.glob("result*.json"))) == 3


def test_checkpoints_from_before_are_evaluated_too(folder):
    before = Evaluator().evaluate(str(folder), "10").metrics
    train(config(40), str(folder), extend=True)
    assert Evaluator().evaluate(str(folder), "10").metrics == before
    assert Evaluator().evaluate(str(folder), "best").step == result(folder)["best_step"]


def test_runs_of_two_lengths_are_compared_by_their_extensions(folder, short, tmp_path):
    train(config(40), str(folder), extend=True)
    report = Report([str(short), str(folder)])
    report.write(str(tmp_path / "report"))
    assert "extensions" in report.console() and "extensions" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.slow
def test_processes_extend_a_run_together(tmp_path):
    command = running.command(tmp_path / "run", **{**SMALL, "steps": 20})
    first = running.run(command)
    assert first.returncode == 0, first.stderr
    longer = [part.replace("--config.steps=20", "--config.steps=40") for part in command]
    processes = running.start_all([*longer, "--extend"], 2)
    said = running.wait_all(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert [phase["step"] for phase in result(tmp_path / "run")["phases"]] == [20, 40]


def refusal(folder, wanted, **flags):
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises((WorkdirError, ConfigError)) as caught:
        train(wanted, str(folder), **flags)
    after = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    assert before == after  # nothing has been touched
    return str(caught.value)


def test_what_cannot_be_extended_is_refused_and_nothing_is_touched(folder, tmp_path):
    assert "steps is 20 there, 40 here. To go on from its end, add --extend" in refusal(folder, config(40))
    assert "--extend" not in refusal(folder, config(10)) and "--extend" not in refusal(folder, config(40, seed=1))
    assert "has 20 steps; give more" in refusal(folder, config(20), extend=True)
    assert f"10 steps; {folder} has 20 steps already" in refusal(folder, config(10), extend=True)
    assert "seed is 0 there, 1 here. Only its length can be extended" in refusal(folder, config(40, seed=1), extend=True)
    assert "add --extend" in refusal(folder, config(40), schedule="constant")
    assert "there is no run to extend" in refusal(tmp_path / "nowhere", config(40), extend=True)
    assert "shorter than optim.warmup, 5 steps" in refusal(folder, config(23), extend=True)
    extensions = (("10 steps", "restart"),)
    assert "--extend sets it" in refusal(folder, config(40, extensions=extensions), extend=True)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"extensions": []', '"extensions": 3'))
    assert "extensions: 3; must be a sequence" in refusal(folder, config(40), extend=True)


def test_an_extended_run_is_no_other_one(folder):
    train(config(30), str(folder), extend=True)
    assert "To go on from its end, add --extend" in refusal(folder, config(30))
    assert "was extended with restart" in refusal(folder, config(30), extend=True, schedule="constant")
    assert "has 30 steps already" in refusal(folder, config(20), extend=True)


def test_lengths_in_other_units_are_compared_in_steps(folder):
    in_epochs = running.config(**{**SMALL, "steps": None, "epochs": 1})  # 45 steps
    assert extended(in_epochs, str(folder)).phase_ends == (20, 45)


@pytest.mark.parametrize(
    ("extensions", "problem"),
    [
        ((("20 steps", "restart"), ("20 steps", "restart")), "20 steps is step 20; the run goes on from there only to step 20"),
        ((("50 steps", "constant"),), "50 steps is step 50; the run goes on from there only to step 40"),
        ((("37 steps", "restart"),), "3 steps from 37 steps on; shorter than optim.warmup, 5 steps"),
        ((("3 steps", "restart"),), "optim.warmup: 5 steps; longer than training, which has 3 steps"),
        ((("20 steps", "stretch"),), "must be one of 'restart', 'constant'"),
        ((("20 years", "restart"),), "must be a duration"),
    ],
)
def test_extensions_that_cannot_be(extensions, problem):
    with pytest.raises(ConfigError, match=problem):
        config(40, extensions=extensions)


def test_a_run_without_extensions_has_the_identity_that_it_had():
    plain = configs.to_dict(config(20))
    assert config_digest(plain) == config_digest({key: value for key, value in plain.items() if key != "extensions"})
    longer = config(40, extensions=(("20 steps", "restart"),))
    assert earlier_digests(longer) == (digest_of(config(20)),)
    in_epochs = {**SMALL, "steps": None}
    twice = running.config(**in_epochs, epochs=4, extensions=(("1.5 epochs", "restart"), ("2 epochs", "constant")))
    assert earlier_digests(twice) == (
        digest_of(running.config(**in_epochs, epochs=2, extensions=(("1.5 epochs", "restart"),))),
        digest_of(running.config(**in_epochs, epochs=1.5)),
    )


def test_steps_of_the_shorter_run_are_those_of_the_longer_one(folder):
    shapes = build(config(20)).shapes
    with Checkpoints(folder / "checkpoints", "longer", earlier=[digest_of(config(20))], read_only=True) as checkpoints:
        restored = checkpoints.restore(shapes)
        assert restored is not None and restored.step == 20 and not restored.damaged and checkpoints.best() is not None
    with Checkpoints(folder / "checkpoints", "longer", earlier=["another"], read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="step 20: it belongs to another experiment"):
            checkpoints.restore(shapes)
        with pytest.raises(CheckpointError, match="it belongs to another experiment"):
            checkpoints.check_experiment()
