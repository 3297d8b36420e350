"""Traces of real runs: does what is written open, and does it hold the steps that were asked for and no others?"""

import time

import jax
import pytest

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training.log_window import Diverged
from lowrank_jax.experiment.training.loop import train
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

SETTINGS = {"log__every": "1 step", "dataset__mixup": 0.0, "steps": 12}


def events(file):
    """The host's events, by name."""
    names = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        names += [event.name for line in plane.lines for event in line.events]
    return names


def steps_of(file):
    """The numbers of the steps in a trace; it also has to show the step's program running."""
    assert any("train_step" in name for name in events(file))
    numbers = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            numbers += [dict(event.stats)["step_num"] for event in line.events if event.name == "train"]
    return sorted(numbers)


def test_the_steps_that_were_asked_for_are_traced_by_every_process(tmp_path, capsys):
    plain = train(running.config(**SETTINGS), str(tmp_path / "plain"))
    traced = train(running.config(profile__steps=(4, 6), **SETTINGS), str(tmp_path / "traced"))
    (file,) = (tmp_path / "traced" / "plugins" / "profile").rglob("*.*")
    assert file.relative_to(tmp_path / "traced").as_posix() == "plugins/profile/steps_4_6/process_0.xplane.pb"
    assert steps_of(file) == [4, 5, 6]
    assert f"traced steps 4 to 6: {file.parent}" in capsys.readouterr().out
    assert not (tmp_path / "plain" / "plugins").exists()
    # Looking at a run changes nothing in it, and it stays the same experiment.
    assert [line["train/loss"] for line in plain.train.values()] == [line["train/loss"] for line in traced.train.values()]
    assert train(running.config(**SETTINGS), str(tmp_path / "traced")).evals == {}


def test_a_stop_within_the_steps_leaves_what_was_traced_and_the_next_start_the_rest(tmp_path):
    config = running.config(profile__steps=(4, 8), **SETTINGS)
    batches, stop = iter(range(1, 100)), running.Stop()

    def interrupted(*args):
        stop.requested = next(batches) == 6
        return put_batch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_jax.experiment.training.loop.put_batch", interrupted)
        assert train(config, str(tmp_path), stop=stop).interrupted
    runs = tmp_path / "plugins" / "profile"
    assert steps_of(runs / "steps_4_6" / "process_0.xplane.pb") == [4, 5, 6]
    assert not train(config, str(tmp_path)).interrupted
    assert steps_of(runs / "steps_7_8" / "process_0.xplane.pb") == [7, 8]


def test_a_run_that_fails_within_the_steps_leaves_its_trace_and_its_reason(tmp_path):
    with pytest.raises(Diverged, match="at step"):
        train(running.config(optim__lr=1e30, profile__steps=(1, 12), **SETTINGS), str(tmp_path))
    (file,) = (tmp_path / "plugins" / "profile").rglob("*.xplane.pb")
    assert steps_of(file)[0] == 1


def test_a_trace_that_cannot_be_written_does_not_hide_why_the_run_failed(tmp_path):
    (tmp_path / "plugins").write_text("in the way")
    with pytest.raises(Diverged, match="at step"):
        train(running.config(optim__lr=1e30, profile__steps=(1, 12), **SETTINGS), str(tmp_path))


@pytest.mark.parametrize("fails", ["start", "write"])
def test_a_trace_that_cannot_be_taken_ends_no_training(tmp_path, capsys, monkeypatch, fails):
    if fails == "start":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    else:
        (tmp_path / "plugins").write_text("in the way")
    run = train(running.config(profile__steps=(3, 5), **SETTINGS), str(tmp_path))
    assert not run.interrupted and len(run.train) == 12
    complaints = [line for line in capsys.readouterr().err.splitlines() if "trace" in line]
    assert len(complaints) == 1 and complaints[0].startswith("steps 3 to 5 could not be traced: [Errno ")


def test_tracing_does_not_count_as_training_time(tmp_path, monkeypatch):
    slow = jax.profiler.stop_trace

    def stop():
        time.sleep(2)
        slow()

    monkeypatch.setattr("jax.profiler.stop_trace", stop)
    run = train(running.config(profile__steps=(4, 6), **{**SETTINGS, "log__every": "12 steps"}), str(tmp_path))
    assert 12 * 32 / run.train[12]["train/images_per_second"] < 2


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0, 3), "must be the first and the last step to trace, from 1"),
        ((5, 4), "must be the first and the last"),
        ((30, 50), "training ends at step 40"),
        ("10:20", "must be a sequence, such as"),
        (10, "must be a sequence"),
        ((1, 2, 3), "must be a sequence of 2"),
    ],
)
def test_mistakes_are_named(steps, message):
    with pytest.raises(ConfigError, match=rf"1 problem\n  profile.steps: .*{message}"):
        running.config(profile__steps=steps)
