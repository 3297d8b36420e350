"""Where a run is taken up: at what was saved, or at the start if that is what the user wants."""

import json
import math
import shutil

import jax
import pytest

from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.report.stored_runs import read
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.workdir.checked_json import seal, unseal
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

SMALL = {"steps": 20, "checkpoint__every": "10 steps"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(running.config(**SMALL), str(folder))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a finished run with checkpoints at steps 10 and 20."""
    return shutil.copytree(whole, tmp_path / "run")


def again(folder, **changes):
    restart = changes.pop("restart", False)
    return train(running.config(**{**SMALL, **changes}), str(folder), restart=restart)


def halted(folder):
    """As a kill after step 10 would have left it."""
    shutil.rmtree(folder / "checkpoints" / "20")
    (folder / "result.json").unlink()
    return folder


def result(folder):
    """What does not differ from time to time."""
    return {name: value for name, value in json.loads((folder / "result.json").read_text()).items() if name in ("eval", "step")}


def forge(folder, at, **changes):
    file = folder / "checkpoints" / str(at) / "info" / "metadata"
    record = {**unseal(json.loads(file.read_text())), **changes}
    file.write_text(json.dumps(seal({name: value for name, value in record.items() if value is not None})))


def test_a_run_that_has_finished_is_said_to_have(folder, whole, capsys):
    again(folder)
    said = capsys.readouterr().out
    assert f"{folder} has finished: step 20 of 20; nothing is left to do" in said and "resuming" not in said
    assert result(folder) == result(whole)


@pytest.mark.parametrize("gone", ["checkpoints", "steps", "checkpoints of an earlier version"])
def test_a_run_whose_checkpoints_are_gone_begins_anew_only_if_that_is_wanted(folder, whole, gone, capsys):
    metrics = (folder / "metrics.jsonl").read_text()
    for path in (folder / "checkpoints").glob("[0-9]*") if gone == "steps" else [folder / "checkpoints"]:
        shutil.rmtree(path)
    if gone == "checkpoints of an earlier version":
        (folder / "saved.json").unlink()
    with pytest.raises(
        WorkdirError, match=r"step 20 of this run was saved, and its checkpoints are gone. Put .* back, or begin anew"
    ):
        again(folder)
    assert (folder / "metrics.jsonl").read_text() == metrics
    again(folder, restart=True)
    assert "begins anew, without a checkpoint; its old metrics are in metrics-1.jsonl" in capsys.readouterr().out
    assert (folder / "metrics-1.jsonl").read_text() == metrics
    assert result(folder) == result(whole)
    again(folder, restart=True)  # by whatever starts it again
    assert "has finished" in capsys.readouterr().out and not (folder / "metrics-2.jsonl").exists()


def test_what_a_process_wrote_that_saved_nothing_is_kept_beside(folder, whole, capsys):
    shutil.rmtree(halted(folder) / "checkpoints")
    (folder / "saved.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("no line of ours\n")
    text = (folder / "metrics.jsonl").read_text()
    again(folder)
    assert f"{folder} begins anew, without a checkpoint; its old metrics are in metrics-1.jsonl" in capsys.readouterr().out
    assert (folder / "metrics-1.jsonl").read_text() == text
    assert result(folder) == result(whole)
    assert [line["step"] for line in running.metrics(folder)] == [10, 20, 20]


def test_metrics_that_have_changed_are_set_aside(folder, whole, capsys):
    changed = halted(folder) / "metrics.jsonl"
    changed.write_text(text := changed.read_text().replace("0.", "1.", 1))
    again(folder)
    assert "metrics.jsonl is not as it was at step 10; it is kept as metrics-1.jsonl" in capsys.readouterr().out
    assert (folder / "metrics-1.jsonl").read_text() == text
    assert running.metrics(folder)[0] == {"step": 10}  # where they begin now
    assert [line["step"] for line in running.metrics(folder)] == [10, 20, 20]
    assert math.isnan(read(folder, "run").figure("early loss")) and read(folder, "run").figure("images/s") > 0
    assert result(folder) == result(whole)


def test_the_end_of_the_metrics_is_known_to_the_result(whole):
    assert json.loads((whole / "result.json").read_text())["metrics"]["bytes"] == (whole / "metrics.jsonl").stat().st_size


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_word(folder, whole, capsys):
    forge(halted(folder), 10, step=None, experiment=None, metrics=None)
    again(folder)
    assert f"{folder}: checkpoint 10 is of an earlier version, which did not record the experiment" in capsys.readouterr().out
    assert result(folder) == result(whole)
    assert running.metrics(folder)[0]["step"] == 10


@pytest.mark.parametrize("changes", [{"seed": 1}, {"optim__lr": 0.01}, {"steps": 30}])
def test_checkpoints_tell_whose_they_are_where_the_config_is_gone(folder, whole, changes):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"belongs to another experiment. Use a new --workdir, or the old settings"):
        again(folder, **changes)
    assert not (folder / "config.json").exists()
    again(folder, checkpoint__keep=5)
    assert result(folder) == result(whole)


def test_a_checkpoint_of_another_run_is_not_taken_for_ours(folder, whole, capsys):
    forge(halted(folder), 10, experiment="theirs", step=20)
    (folder / "checkpoints" / "10").rename(folder / "checkpoints" / "20")
    with pytest.raises(CheckpointError, match="no usable checkpoint\n  step 20: it belongs to another experiment"):
        again(folder)
    shutil.copytree(whole / "checkpoints" / "10", folder / "checkpoints" / "10")
    again(folder)
    assert "checkpoint 20 cannot be used (it belongs to another experiment); using 10 instead" in capsys.readouterr().out
    assert result(folder) == result(whole)


RECORDS = [
    {"data": 7}, {"data": {"next_index": 0}}, {"seconds": True}, {"window": [{"loss": 1.0}]},
    {"window": [{"loss": 1.0, "grad_norm": 1.0, "lr": 1.0}]},
    {"window": [{"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "top1": 1.0, "more": 1.0}]},
    {"evaluated": {"eval": {"top1": "x"}}}, {"evaluated": {"eval": {}}}, {"evaluated": {"eval": {"loss": 1.0}}},
    {"evaluated": {"eval": {"loss": float("nan"), "top1": 1.0}}},
    {"metrics": {"bytes": 1.0, "crc32": 1}},
]  # fmt: skip


@pytest.mark.parametrize("changes", RECORDS, ids=str)
def test_a_record_that_training_cannot_go_on_from_is_passed_over(folder, whole, changes, capsys):
    forge(folder, 20, **changes)
    again(folder)
    assert f"checkpoint 20 cannot be used (its record has no valid {next(iter(changes))})" in capsys.readouterr().out
    assert result(folder) == result(whole)


def test_a_metric_that_is_not_finite_is_no_damage(folder, whole):
    forge(folder, 20, evaluated={"eval": {**result(whole)["eval"], "own": float("nan")}})
    again(folder)
    assert result(folder)["eval"] == {**result(whole)["eval"], "own": None}


SETTINGS = {
    "jax_enable_x64": True,
    "jax_random_seed_offset": 7,
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_does_not_go_on_under_other_settings_of_jax(folder, name):
    before = getattr(jax.config, name)
    jax.config.update(name, SETTINGS[name])
    try:
        with pytest.raises(
            WorkdirError, match=f"other settings of jax: {name} was {before}, and is {SETTINGS[name]}. Set them"
        ):
            again(folder)
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("step", ['"20"', "null", "20.0", "true", "[20]"])
def test_a_record_of_saves_that_is_damaged_is_no_reason_to_begin_anew(folder, step):
    shutil.rmtree(halted(folder) / "checkpoints")
    (folder / "saved.json").write_text(f'{{"step": {step}}}')
    with pytest.raises(WorkdirError, match=r"saved.json is damaged: it has no step"):
        again(folder)


def test_a_restart_leaves_no_result_of_the_run_before(folder, monkeypatch):
    shutil.rmtree(folder / "checkpoints")
    monkeypatch.setattr("lowrank_jax.experiment.training.loop.put_batch", raising(MemoryError))
    with pytest.raises(MemoryError):
        again(folder, restart=True)
    assert not (folder / "result.json").exists() and (folder / "result-1.json").exists()


def raising(error):
    def raise_it(*args):
        raise error

    return raise_it


def test_a_command_that_is_refused_changes_nothing(folder):
    config = (folder / "config.json").read_text()
    with Workdir(folder).locked(), pytest.raises(WorkdirError, match="another process is training in"):
        again(folder, eval__batch_size=32)
    assert (folder / "config.json").read_text() == config


def test_a_step_beyond_the_end_is_passed_over(folder, whole, capsys):
    shutil.copytree(folder / "checkpoints" / "20", folder / "checkpoints" / "30")
    forge(folder, 30, step=30)
    again(folder)
    assert "checkpoint 30 cannot be used (" in capsys.readouterr().out
    assert result(folder) == result(whole)


@pytest.mark.parametrize("name", ["run[1]", "back\\slash", "[!x]/run", "a**b"])
def test_a_path_where_orbax_loses_checkpoints_is_refused_at_the_start(tmp_path, name):
    with pytest.raises(WorkdirError, match="no checkpoint can be saved where a folder has"):
        again(tmp_path / name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["checkpoints", "damaged", "plugins", "log.txt"])
def test_nothing_is_written_through_links(folder, tmp_path, name):
    (tmp_path / "outside").mkdir()
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(WorkdirError, match=f"{name} is a link, and nothing is written through links"):
        again(folder)
    assert not any((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", ["config.json", "overview.txt", ".config.json.partial", "result.json"])
def test_a_link_in_the_place_of_a_file_is_not_followed(folder, tmp_path, name):
    content = (folder / name).read_text() if (folder / name).exists() else "precious"
    (tmp_path / "outside").write_text(content)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "outside")
    again(folder)
    assert (tmp_path / "outside").read_text() == content
    assert not (folder / name).is_symlink()
