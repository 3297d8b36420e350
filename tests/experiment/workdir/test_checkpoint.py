"""Checkpoints that come back exactly, and damage that is noticed."""

import gc
import logging
import resource
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError, Checkpoints
from lowrank_jax.kernel import LowRankKernel


def make_state(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    pair = LowRankKernel(jax.random.normal(keys[0], (64, 8)), jax.random.normal(keys[1], (8, 32)))
    params = {"dense": {"kernel": pair, "bias": jax.random.normal(keys[2], (32,))}}
    return TrainState(jnp.int32(seed), params, {"mean": jnp.ones(3)}, (params,))


TARGET = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    make_state(0),
)


def info(top1=None):
    return {"data": {"next_index": 3}, "score": top1, "seconds": 1.5}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save(folder, tops, **settings):
    with Checkpoints(folder, **settings) as checkpoints:
        for step, top1 in enumerate(tops, start=1):
            if top1 is not None:
                checkpoints.note_score(step, top1)
            checkpoints.save(step, make_state(step), info(top1))
            checkpoints.wait()
    return folder


def data_files(step_folder):
    """Largest first."""
    return sorted((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)


def test_a_state_comes_back_with_what_was_saved_beside_it(tmp_path):
    save(tmp_path / "c", [None, 0.5])
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert (restored.step, restored.damaged) == (2, {})
    assert restored.info["data"] == {"next_index": 3} and restored.info["score"] == 0.5
    assert_equal(restored.state, make_state(2))


def test_parts_of_a_state_can_be_read_alone(tmp_path):
    save(tmp_path / "c", [None])
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        restored = checkpoints.restore({"params": TARGET.params, "batch_stats": TARGET.batch_stats})
    assert_equal(restored.state["params"], make_state(1).params)


def test_no_checkpoints_is_no_error(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(TARGET) is None
        assert (checkpoints.steps(), checkpoints.best(), checkpoints.best_score()) == ([], None, -1.0)


def test_the_latest_and_the_best_are_kept_also_across_a_restart(tmp_path):
    save(tmp_path / "c", [0.2, 0.9, None, 0.3, 0.4], keep=2)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best(), checkpoints.best_score()) == ([2, 4, 5], 2, 0.9)
        checkpoints.save(6, make_state(6), info())
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]


def test_a_step_evaluated_after_it_was_saved_can_be_the_best(tmp_path):
    save(tmp_path / "c", [0.2, None])
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.note_score(2, 0.9)
        for step in (3, 4, 5):
            checkpoints.save(step, make_state(step), info())
            checkpoints.wait()
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best()) == ([2, 4, 5], 2)


@pytest.mark.parametrize("content", ["", "{", "null", '{"body": {"1": 0.99}, "check": 7}'])
def test_damaged_scores_are_taken_from_the_steps_own_records(tmp_path, content):
    save(tmp_path / "c", [0.2, 0.9, 0.3], keep=3)
    (tmp_path / "c" / "scores.json").write_text(content)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert (checkpoints.best(), checkpoints.best_score()) == (2, 0.9)
        assert checkpoints.restore(TARGET).step == 3


@pytest.mark.parametrize("how", ["emptied", "cut", "flipped", "removed"])
def test_damage_to_any_file_of_a_step_is_noticed_or_harmless(tmp_path, how):
    folder = save(tmp_path / "c", [0.5, 0.6], keep=3)
    for number, file in enumerate(data_files(folder / "2")):
        copy = tmp_path / f"{how}{number}"
        shutil.copytree(folder, copy / "c")
        victim = copy / "c" / file.relative_to(folder)
        content = bytearray(victim.read_bytes())
        if how == "removed":
            victim.unlink()
        elif content:
            content[len(content) // 3] ^= 0x10
            victim.write_bytes({"emptied": b"", "cut": bytes(content[: len(content) // 2]), "flipped": content}[how])
        with Checkpoints(copy / "c", read_only=True) as checkpoints:
            restored = checkpoints.restore(TARGET)
        assert_equal(restored.state, make_state(restored.step))
        assert restored.info["score"] == (0.5 if restored.step == 1 else 0.6), file


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoints(tmp_path / "c")


@pytest.mark.parametrize("limit", [0, 2**14])  # at once, and in the background, where only the array is too large
def test_a_save_that_fails_is_told_once(tmp_path, caplog, capfd, limit):
    large = TrainState(jnp.int32(2), {"kernel": jax.random.normal(jax.random.key(2), (256, 256))}, {}, ())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = pytest.raises(CheckpointError, match=r"/c: a checkpoint could not be written: .*File too large")
    with told, Checkpoints(save(tmp_path / "c", [None])) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            checkpoints.save(2, large, info())
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("place", np.linspace(0, 0.99, 12))
def test_a_flipped_byte_is_noticed_or_harmless(tmp_path, place):
    file = data_files(save(tmp_path / "c", [None, None], keep=3) / "2")[0]
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x10
    file.write_bytes(content)
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(TARGET)
        assert restored.step == 1 and list(restored.damaged) == [2] if restored.damaged else restored.step == 2
        assert_equal(restored.state, make_state(restored.step))


def test_damage_to_array_bytes_that_orbax_itself_does_not_see_is_named(tmp_path):
    """The same step, saved again with one other element under the first one's record."""
    save(tmp_path / "c", [None, None], keep=3)
    good = make_state(2)
    dense = good.params["dense"]
    kernel = LowRankKernel(dense["kernel"].u.at[3, 3].add(1e-3), dense["kernel"].v)
    tampered = TrainState(good.step, {"dense": {**dense, "kernel": kernel}}, good.batch_stats, good.opt_state)
    with Checkpoints(tmp_path / "other", keep=3) as other:
        other.save(2, tampered, info())
    (tmp_path / "c" / "2" / "state").rename(tmp_path / "aside")
    (tmp_path / "other" / "2" / "state").rename(tmp_path / "c" / "2" / "state")
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert restored.step == 1
    assert restored.damaged == {2: "digest of params/dense/kernel/u differs"}


@pytest.mark.parametrize("which", range(6))
def test_a_truncated_file_is_noticed_and_the_step_set_aside(tmp_path, which):
    file = data_files(save(tmp_path / "c", [None, None], keep=3) / "2")[which]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        restored = checkpoints.restore(TARGET)
        assert_equal(restored.state, make_state(restored.step))
        if restored.damaged:
            assert checkpoints.steps() == [1]
            assert (tmp_path / "damaged" / "2").is_dir()  # nothing is deleted
            checkpoints.save(2, make_state(2), info())  # and the step can be saved again
            checkpoints.wait()
            assert checkpoints.steps() == [1, 2]


def test_a_changed_record_is_noticed(tmp_path):
    file = save(tmp_path / "c", [None, None], keep=3) / "2" / "info" / "metadata"
    text = file.read_text()
    assert '"next_index": 3' in text or '"next_index":3' in text
    file.write_text(text.replace('"next_index": 3', '"next_index": 4').replace('"next_index":3', '"next_index":4'))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(TARGET).damaged == {2: "the digest of its own record differs"}


def test_when_nothing_is_good_nothing_is_moved(tmp_path):
    save(tmp_path / "c", [None, None], keep=3)
    for step in ("1", "2"):
        for file in data_files(tmp_path / "c" / step)[:4]:
            file.write_bytes(b"")
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be used.*step 2.*step 1"):
            checkpoints.restore(TARGET)
        assert checkpoints.steps() == [1, 2]


def test_read_only_reports_damage_and_moves_nothing(tmp_path):
    file = data_files(save(tmp_path / "c", [None, None], keep=3) / "2")[0]
    file.write_bytes(b"")
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.restore(TARGET).step == 1
    assert (tmp_path / "c" / "2").is_dir()


def test_a_step_that_its_run_deletes_while_they_are_listed_is_no_error(tmp_path, monkeypatch):
    save(tmp_path / "c", [None, None], keep=3)
    (tmp_path / "c" / "1" / "_CHECKPOINT_METADATA").unlink()  # what orbax has its time from, else from the folder
    kind, gone = type(epath.Path(tmp_path)), []
    stat = kind.stat

    def too_late(self):
        if self.name == "1" and not gone:
            gone.append(self)
            shutil.rmtree(self)
        return stat(self)

    monkeypatch.setattr(kind, "stat", too_late)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert gone
        assert checkpoints.steps() == [2]


def test_a_step_that_its_run_deletes_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    save(tmp_path / "c", [None, None], keep=3)
    save(tmp_path / "later", [None, None, None], keep=3)
    read = Checkpoints._read

    def too_late(self, step, target):
        if step == 2:
            shutil.rmtree(tmp_path / "c" / "2")
            shutil.copytree(tmp_path / "later" / "3", tmp_path / "c" / "3")
        return read(self, step, target)

    monkeypatch.setattr(Checkpoints, "_read", too_late)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert (restored.step, restored.damaged) == (3, {})


def test_a_step_can_be_asked_for_by_its_number(tmp_path):
    save(tmp_path / "c", [None, None, None], keep=3)
    data_files(tmp_path / "c" / "2")[0].write_bytes(b"")
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert_equal(checkpoints.restore_step(1, TARGET).state, make_state(1))
        with pytest.raises(CheckpointError, match="checkpoint 2 is damaged"):
            checkpoints.restore_step(2, TARGET)
        shutil.rmtree(tmp_path / "c" / "3")
        assert checkpoints.restore_step(3, TARGET) is None


def test_a_bucket_is_no_folder_here_and_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(CheckpointError, match=r"^gs://bucket/run/checkpoints: checkpoints there need pip install"):
        Checkpoints("gs://bucket/run/checkpoints")
