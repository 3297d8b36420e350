import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from lowrank_jax.experiment.config.files import to_dict
from lowrank_jax.experiment.config.parse import Config
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.identity import config_digest
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError


def config(**changes):
    values = to_dict(Config(steps=10))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[section] = value
    return values


def test_an_experiment_may_come_back_to_its_folder(tmp_path):
    folder = Workdir(tmp_path / "run")
    folder.claim(config())
    folder.claim(config(log__every="7 steps", mesh__data=4, checkpoint__keep=5, dataset__data_dir="/elsewhere"))
    assert config_digest(config()) == config_digest(config(mesh__data=4))


def test_another_experiment_is_refused_with_the_keys_that_differ(tmp_path):
    folder = Workdir(tmp_path / "run")
    folder.claim(config(lowrank__scale=0.05))
    message = (
        r"belongs to another experiment: lowrank.scale is 0.05 there, 0.2 here; seed is 0 there, 3 here. Use a new --workdir"
    )
    with pytest.raises(WorkdirError, match=message):
        folder.claim(config(lowrank__scale=0.2, seed=3))
    assert folder.read_config()["lowrank"]["scale"] == 0.05
    assert config_digest(config(seed=3)) != config_digest(config())


def test_a_setting_that_is_younger_than_the_experiment_has_its_default(tmp_path):
    old = config(seed=3)
    digest = config_digest(old)
    del old["dataset"]["mixup"], old["log"]
    folder = Workdir(tmp_path)
    folder.write_json("config.json", old)
    folder.check(config(seed=3))
    assert folder.read_config() == json.loads(json.dumps(config(seed=3)))
    assert config_digest(old) == digest != config_digest(config())
    with pytest.raises(WorkdirError, match=r"dataset.mixup is 0.0 there, 0.2 here"):
        folder.check(config(seed=3, dataset__mixup=0.2))


def test_a_folder_may_be_deeper_than_python_nests_calls(tmp_path):
    top = tmp_path / "a"
    deep = top.joinpath(*["a"] * 1100)
    try:
        folder = Workdir(deep / "run")
        with folder.locked():
            folder.claim(config())
        assert folder.read_config()["seed"] == 0
        with Checkpoints(Workdir(deep / "other").checkpoints) as checkpoints:
            checkpoints.note_score(1, 0.5)
        assert (deep / "other" / "checkpoints" / "scores.json").exists()
    finally:
        subprocess.run(["rm", "-r", str(top)], check=True)  # as pytest itself could not


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir(tmp_path / "file").claim(config())
    with pytest.raises(WorkdirError, match=r"has no config\.json"):
        Workdir(tmp_path).read_config()
    (tmp_path / "config.json").write_text('{"model": {}, "dataset": {}, "lowrank": {}}')
    with pytest.raises(WorkdirError, match=r"config\.json is not the config of an experiment"):
        Workdir(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
        Workdir(tmp_path).read_config()


def test_a_bucket_out_of_reach_is_an_error_not_a_wait(monkeypatch):
    # TensorFlow, which takes seconds to import, says the same.  EPATH_USE_TF is read once a process.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    with pytest.raises(WorkdirError, match="cannot reach az://bucket: "):
        Workdir("az://bucket/run").claim(config())


def test_one_process_at_a_time(tmp_path):
    first, second = Workdir(tmp_path), Workdir(tmp_path)
    refused = pytest.raises(WorkdirError, match=f"another process is training in {tmp_path}; stop it, or use a new --workdir")
    with first.locked(), refused, second.locked(seconds=0.2):
        pass
    with second.locked(seconds=0.2):
        pass
    with first.locked(), Workdir(tmp_path, active=False).locked():  # one that writes nothing
        pass


def test_a_process_that_is_killed_frees_its_lock(tmp_path):
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()"
    hold += "; print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(WorkdirError, match="another process is training"), Workdir(tmp_path).locked(seconds=0.2):
                pass
        finally:
            holder.kill()
    with Workdir(tmp_path).locked(seconds=5):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with Workdir(tmp_path).locked(seconds=0.2), Workdir(tmp_path).locked(seconds=0.2):
        pass


@pytest.mark.parametrize("name", ["ranks.json", "weights.json"])
def test_a_record_whose_checksum_is_gone_is_refused_where_every_version_wrote_one(tmp_path, name):
    Workdir(tmp_path).write_json(name, {"step": 0})
    assert Workdir(tmp_path).read_json(name) == {"step": 0}
    (tmp_path / name).write_text('{"step": 0}')
    with pytest.raises(WorkdirError, match=rf"{name} is damaged: .*it has no 'check'"):
        Workdir(tmp_path).read_json(name)


def test_a_figure_that_changed_in_a_record_is_noticed(tmp_path):
    folder, record = Workdir(tmp_path), {"mean": [0.1, 0.25], "sizes": {"train": 96}, "name": "é", "whole": None}
    folder.write_json("dataset.json", record)
    written = json.loads((tmp_path / "dataset.json").read_text())
    assert folder.read_json("dataset.json") == record and written.keys() == {*record, "check"}
    for name, value in {"mean": [0.1, 1.25], "sizes": {"train": 95}, "name": "e", "check": written["check"] + 1}.items():
        (tmp_path / "dataset.json").write_text(json.dumps({**written, name: value}))
        with pytest.raises(WorkdirError, match=r"dataset.json is damaged: it was changed after it was written"):
            folder.read_json("dataset.json")
    (tmp_path / "dataset.json").write_text(json.dumps(record))  # as earlier versions wrote it
    assert folder.read_json("dataset.json") == record


def test_what_is_just_shallow_enough_to_be_read_is_refused_like_what_is_not(tmp_path):
    for depth in range(900, 1000):
        (tmp_path / "ranks.json").write_text('{"check": 1, "a": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(WorkdirError, match=r"ranks\.json is damaged"):
            Workdir(tmp_path).read_json("ranks.json")
