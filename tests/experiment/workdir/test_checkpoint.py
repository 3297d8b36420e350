"""Checkpoints that come back exactly, and damage that is noticed."""

import dataclasses
import gc
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.workdir.checked_json import seal, unseal
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError, Checkpoints
from lowrank_jax.experiment.workdir.digest import digests
from lowrank_jax.kernel import LowRankKernel
from tests.running import ROOT


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_state(seed):
    """From numpy: no program has to be compiled for it."""
    pair = LowRankKernel(normal([seed, 0], 64, 8), normal([seed, 1], 8, 32))
    params = {"dense": {"kernel": pair, "bias": normal([seed, 2], 32)}}
    return jax.device_put(TrainState(np.int32(seed), params, {"mean": np.ones(3, np.float32)}, (params,)))


TARGET = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0))


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


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """A failed read is collected, which takes long with all that other tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2, which nobody writes to."""
    return save(tmp_path_factory.mktemp("saved") / "c", [0.6, 0.5], keep=3)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Steps 1 to 3, of which the second is the best."""
    return save(tmp_path_factory.mktemp("three") / "c", [0.2, 0.9, 0.3], keep=3)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of them."""
    return shutil.copytree(saved, tmp_path / "c")


def data_files(step_folder):
    """Largest first."""
    return sorted((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)


def test_a_state_comes_back_with_what_was_saved_beside_it(folder):
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert (restored.step, restored.damaged) == (2, {})
    assert restored.info["data"] == {"next_index": 3} and restored.info["score"] == 0.5
    assert_equal(restored.state, make_state(2))


def test_parts_of_a_state_can_be_read_alone(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore({"params": TARGET.params, "batch_stats": TARGET.batch_stats})
    assert_equal(restored.state["params"], make_state(2).params)


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
def test_damaged_scores_are_taken_from_the_steps_own_records(three, tmp_path, content):
    folder = shutil.copytree(three, tmp_path / "c")
    (folder / "scores.json").write_text(content)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert (checkpoints.best(), checkpoints.best_score()) == (2, 0.9)
        assert checkpoints.restore(TARGET).step == 3


SCORES = [
    [1],
    1,
    {"1": "best"},
    {"1": None},
    {"1": True},
    {"1": [1]},
    {"one": 1.0},
    {"-1": 1.0},
    {"1" * 30: 1.0},
    {"1": 10**400},
    {"1": 0.99},
]


@pytest.mark.parametrize("forged", SCORES, ids=str)
def test_scores_that_were_forged_do_not_outweigh_the_steps_own_records(three, tmp_path, forged):
    folder = shutil.copytree(three, tmp_path / "c")
    (folder / "scores.json").write_text(json.dumps(seal(forged)))
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert (checkpoints.best(), checkpoints.best_score()) == (2, 0.9)


def copied(folder, old, new):
    shutil.rmtree(folder / new, ignore_errors=True)
    shutil.copytree(folder / old, folder / new)


def linked(folder, old, new):
    (folder / new).symlink_to(old)


RENAMED = {
    "a later number": (lambda folder: copied(folder, "1", "3"), "it is step 1 under another name"),
    "another's place": (lambda folder: copied(folder, "1", "2"), "it is step 1 under another name"),
    "25 digits": (lambda folder: copied(folder, "2", "1" * 25), "it is step 2 under another name"),
    "a record to fit": (lambda folder: (copied(folder, "1", "3"), forge(folder, 3, step=3)), "its state is that of step 1"),
    "no record of it": (lambda folder: (copied(folder, "1", "3"), forge(folder, 3, step=None)), "its state is that of step 1"),
}


@pytest.mark.parametrize(("rename", "reason"), RENAMED.values(), ids=RENAMED)
def test_a_step_is_what_its_folder_says_or_it_is_set_aside(folder, rename, reason):
    rename(folder)
    newest = max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    with Checkpoints(folder, keep=3) as checkpoints:
        restored = checkpoints.restore(TARGET)
        assert restored.damaged == {newest: reason}
        assert_equal(restored.state, make_state(restored.step))
        assert newest not in checkpoints.steps()
    assert (folder.parent / "damaged" / str(newest)).is_dir()


@pytest.mark.parametrize("name", ["0100", "step_100", "+100", "1e2", "\u0e51", "100.orbax-checkpoint-tmp-7", "x"])
def test_what_has_no_number_of_a_step_is_none(folder, name):
    copied(folder, "2", name)
    for read_only in (True, False):
        with Checkpoints(folder, read_only=read_only) as checkpoints:
            assert checkpoints.steps() == [1, 2]
            assert checkpoints.restore(TARGET).step == 2


@pytest.mark.parametrize("target", ["1", "nowhere", "3", ".."])
def test_a_link_is_no_step(folder, target):
    linked(folder, target, "3")
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore(TARGET).step == 2
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(TARGET)
        assert (restored.step, restored.damaged, checkpoints.steps()) == (2, {3: "it is a link"}, [1, 2])
        checkpoints.save(3, make_state(3), info())
    assert (folder / "3").is_dir() and not (folder / "3").is_symlink()
    assert (folder.parent / "damaged" / "3").is_symlink()


@pytest.mark.parametrize("name", ["3\n", "3 ", "03"])
def test_what_orbax_alone_takes_for_a_step_is_out_of_its_way(folder, name):
    copied(folder, "2", name)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(TARGET).step == 2
        checkpoints.save(3, make_state(3), info())
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore(TARGET).step == 3


def test_a_link_in_the_place_of_an_unfinished_step_is_out_of_the_way(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (folder / "3.orbax-checkpoint-tmp").symlink_to(tmp_path / "outside")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, make_state(3), info())
    assert (folder / "3").is_dir() and (tmp_path / "outside").is_dir()


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("file", ["info/metadata", "state/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_step_with_a_pipe_in_it_is_not_waited_for(folder, file, read_only):
    (folder / "2" / file).unlink()
    os.mkfifo(folder / "2" / file)
    with Checkpoints(folder, read_only=read_only) as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert (restored.step, restored.damaged) == (1, {2: f"{file.split('/')[-1]} is no plain file"})


@pytest.mark.parametrize("file", ["info/metadata", "state/manifest.ocdbt"])
def test_a_file_without_end_is_not_read(folder, file):
    os.truncate(folder / "2" / file, 2**40)
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert (restored.step, restored.damaged) == (1, {2: f"{file.split('/')[-1]} has 1,099,511,627,776 bytes"})


METADATA = [
    "\x1b]0;x\x07", "[" * 100_000, '{"init_timestamp_nsecs": NaN, "metrics": 1}', '{"init_timestamp_nsecs": ' + "9" * 30 + "}",
    "[1]", "3", '"a"', '{"item_handlers": 3}', '{"item_handlers": {"state": 4}}', '{"metrics": 4}',
    '{"init_timestamp_nsecs": "a"}', '{"commit_timestamp_nsecs": []}', '{"custom_metadata": []}', '{"performance_metrics": 1}',
]  # fmt: skip


@pytest.mark.parametrize("content", METADATA)
@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "metrics/metrics"])
def test_what_is_done_to_a_step_stops_no_other(folder, file, content, capfd):
    (folder / "1" / "metrics").mkdir()
    (folder / "1" / file).write_text(content)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(TARGET).step == 2
        checkpoints.save(3, make_state(3), info())
    assert "\x1b" not in capfd.readouterr().err
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]  # the best, and the latest two


@pytest.mark.parametrize("content", METADATA)
def test_damaged_metadata_of_the_newest_step_are_noticed_or_harmless(folder, content, capfd):
    (folder / "2" / "_CHECKPOINT_METADATA").write_text(content)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(TARGET)
        assert_equal(restored.state, make_state(restored.step))
    assert "\x1b" not in capfd.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.touch()], ids=["pipe", "file"])
def test_what_is_no_folder_is_no_step_and_not_in_the_way(folder, make):
    make(folder / "3")
    make(folder / "4.orbax-checkpoint-tmp")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(TARGET).step == 2
        for step in (3, 4):
            checkpoints.save(step, make_state(step), info())
            checkpoints.wait()
        assert checkpoints.steps() == [1, 3, 4]


def test_a_link_out_of_a_step_is_not_followed(folder, tmp_path):
    shutil.move(folder / "2" / "info", tmp_path / "outside")
    (tmp_path / "outside" / "metadata").unlink()
    os.mkfifo(tmp_path / "outside" / "metadata")
    (folder / "2" / "info").symlink_to(tmp_path / "outside")
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert (restored.step, restored.damaged) == (1, {2: "info is a link"})


def test_a_link_that_is_no_step_stays(folder):
    linked(folder, "2", "latest")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(TARGET).damaged == {}
    assert (folder / "latest").is_symlink()


def test_what_is_set_aside_gets_a_name_that_is_free(folder):
    for name in ("2", "2-2"):
        (folder.parent / "damaged" / name).mkdir(parents=True)
    (folder.parent / "damaged" / "2-1").symlink_to("nowhere")
    emptied(data_files(folder / "2")[0])
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(TARGET).step == 1
    assert {path.name for path in (folder.parent / "damaged").iterdir()} == {"2", "2-1", "2-2", "2-3"}


def forge(folder, at, **changes):
    """Changes the record of a step, and seals it again."""
    file = folder / str(at) / "info" / "metadata"
    record = {**unseal(json.loads(file.read_text())), **changes}
    file.write_text(json.dumps(seal({name: value for name, value in record.items() if value is not None})))


def test_a_step_of_another_experiment_is_not_taken(folder):
    for step in (1, 2):
        forge(folder, step, experiment="theirs")
    with Checkpoints(folder, "theirs", read_only=True) as theirs:
        restored = theirs.restore(TARGET)
        assert restored.names_itself and restored.info["step"] == 2
        theirs.check_experiment()
    with Checkpoints(folder, "ours") as ours:
        with pytest.raises(CheckpointError, match=r"it belongs to another experiment. Use a new --workdir, or the old"):
            ours.check_experiment()
        with pytest.raises(
            CheckpointError, match="no usable checkpoint\n  step 2: it belongs to another experiment\n  step 1: it"
        ):
            ours.restore(TARGET)
    assert (folder / "2").is_dir()  # when nothing is good, nothing is moved


def test_a_step_of_a_version_that_did_not_say_whose_it_is_is_taken(folder):
    for step in (1, 2):
        forge(folder, step, experiment=None, step=None)
    with Checkpoints(folder, "ours") as ours:
        ours.check_experiment()
        restored = ours.restore(TARGET)
    assert (restored.step, restored.names_itself, restored.damaged) == (2, False, {})


@pytest.mark.parametrize(
    "record", ["[]", "null", '"x"', json.dumps(seal([1])), json.dumps(seal({})), "[" * 100_000], ids=lambda r: r[:9]
)
def test_a_record_that_is_none_is_damage(folder, record):
    (folder / "2" / "info" / "metadata").write_text(record)
    with Checkpoints(folder, "ours", read_only=True) as checkpoints:
        checkpoints.check_experiment()
        assert checkpoints.best() == 1
        assert checkpoints.restore(TARGET).step == 1


def test_a_step_that_is_unfit_for_its_reader_is_passed_over(folder):
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore(TARGET, lambda restored: "too late" if restored.step > 1 else "")
    assert (restored.step, restored.damaged) == (1, {2: "too late"})


def test_steps_that_a_kill_kept_from_being_deleted_are_deleted_later(three, tmp_path):
    three = shutil.copytree(three, tmp_path / "c")
    with Checkpoints(three, keep=1) as checkpoints:
        checkpoints.tidy()
        assert checkpoints.steps() == [2, 3]
    assert not (three / "1").exists()


def test_what_was_saved_is_looked_for(tmp_path):
    found = []
    with Checkpoints(tmp_path / "c", confirmed=found.append) as checkpoints:
        checkpoints.save(1, make_state(1), info())
        assert found == []
        checkpoints.save(2, make_state(2), info())
        assert found == [1]
        checkpoints.wait()
        assert found == [1, 2]
        checkpoints.save(3, make_state(3), info())
    assert found == [1, 2, 3]


def test_a_save_is_confirmed_as_soon_as_it_is_on_disk(tmp_path, monkeypatch):
    held, wait, found = threading.Event(), ocp.AsyncCheckpointer.wait_until_finished, []

    def held_up(self):
        if threading.current_thread() is not threading.main_thread():
            held.wait(60)
        wait(self)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", held_up)
    with Checkpoints(tmp_path / "c", keep=1, confirmed=found.append) as checkpoints:
        checkpoints.confirm()
        held.set()
        checkpoints.save(1, make_state(1), info())
        checkpoints.wait()
        held.clear()
        checkpoints.save(2, make_state(2), info())
        checkpoints.confirm()
        assert (found, checkpoints.on_disk) == ([1], 1) and (tmp_path / "c" / "1").exists()
        held.set()
        for _ in range(600):
            checkpoints.confirm()
            if len(found) > 1:
                break
            time.sleep(0.1)
        assert (found, checkpoints.on_disk) == ([1, 2], 2) and not (tmp_path / "c" / "1").exists()
        checkpoints.wait()
    assert found == [1, 2]
    with Checkpoints(tmp_path / "c", confirmed=found.append) as checkpoints:
        checkpoints.restore(TARGET)
        assert (found, checkpoints.on_disk) == ([1, 2, 2], 2)


@pytest.mark.parametrize("name", ["a[1]", "back\\slash"])
def test_a_save_that_orbax_loses_is_an_error(tmp_path, name):
    """It globs its own path: the manifest of the arrays is never made."""
    with (
        pytest.raises(CheckpointError, match="step 1 was written, and is not there"),
        Checkpoints(tmp_path / name) as checkpoints,
    ):
        checkpoints.save(1, make_state(1), info())


READ = """
import sys, pathlib
from tests.experiment.workdir.test_checkpoint import TARGET
from lowrank_jax.experiment.workdir.checked_json import seal, unseal
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
with Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:
    checkpoints.restore(TARGET)
"""


MORTAL = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
"""Runs a command that permissions hold for, also if root starts it."""


@pytest.mark.slow
@pytest.mark.skipif(bool(MORTAL) and not shutil.which("setpriv"), reason="permissions do not hold for root without setpriv")
def test_a_step_that_this_user_may_not_read_is_not_damaged(folder):
    data_files(folder / "2")[0].chmod(0)
    command = [*MORTAL, sys.executable, "-c", READ, folder]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "this user needs permission to read it" in ended.stderr
    assert (folder / "2").is_dir()


@pytest.mark.parametrize("turn", [3, 4, 5])  # thirds, fourths and fifths of the file: values, names and structure
def test_metadata_with_a_flipped_byte_are_noticed_or_harmless(saved, tmp_path, turn):
    """A leaf that is called otherwise there is one that orbax leaves out."""

    def flip(file):
        content = bytearray(file.read_bytes())
        content[len(content) // turn] ^= 0x10
        file.write_bytes(content)

    check_damage(saved, tmp_path / "c", saved / "2" / "state" / "_METADATA", flip)


def emptied(file):
    file.write_bytes(b"")


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flipped(file):
    content = bytearray(file.read_bytes())
    if content:
        content[len(content) // 3] ^= 0x10
        file.write_bytes(content)


def removed(file):
    file.unlink()


DAMAGES = (emptied, cut, flipped, removed)


def check_damage(saved, copy, file, damage):
    """Whatever becomes of a file of step 2, a good state comes back."""
    shutil.copytree(saved, copy)
    damage(copy / file.relative_to(saved))
    with Checkpoints(copy, read_only=True) as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert_equal(restored.state, make_state(restored.step))
    assert restored.info["score"] == (0.6 if restored.step == 1 else 0.5), file


def test_damage_to_any_file_of_a_step_is_noticed_or_harmless(saved, tmp_path):
    """The largest files and every third of the others, each in one of the four ways; the slow test has all."""
    files = data_files(saved / "2")
    for number, file in enumerate([*files[:4], *files[4::3]]):
        check_damage(saved, tmp_path / str(number), file, DAMAGES[number % len(DAMAGES)])


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_all_damages_to_all_files_of_a_step_are_noticed_or_harmless(saved, tmp_path, damage):
    for number, file in enumerate(data_files(saved / "2")):
        check_damage(saved, tmp_path / str(number), file, damage)


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoints(tmp_path / "c")


@pytest.mark.parametrize("limit", [0, 2**14])  # at once, and in the background, where only the array is too large
def test_a_save_that_fails_is_told_once(tmp_path, caplog, capfd, limit):
    large = jax.device_put(TrainState(np.int32(2), {"kernel": normal(2, 256, 256)}, {}, ()))
    digests(large)  # compiled now: the compilation cache cannot be written later
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = pytest.raises(CheckpointError, match=r"/c: cannot write a checkpoint: .*File too large")
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


@pytest.mark.parametrize("place", [0.0, 0.5, *(pytest.param(i / 12, marks=pytest.mark.slow) for i in range(1, 12) if i != 6)])
def test_a_flipped_byte_is_noticed_or_harmless(folder, place):
    file = data_files(folder / "2")[0]
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x10
    file.write_bytes(content)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(TARGET)
        assert restored.step == 1 and list(restored.damaged) == [2] if restored.damaged else restored.step == 2
        assert_equal(restored.state, make_state(restored.step))


def test_damage_to_array_bytes_that_orbax_itself_does_not_see_is_named(folder, tmp_path):
    """The same step, saved again with one other element under the first one's record."""
    good = make_state(2)
    dense = good.params["dense"]
    u = np.array(dense["kernel"].u)
    u[3, 3] += 1e-3
    params = {"dense": {**dense, "kernel": LowRankKernel(jax.device_put(u), dense["kernel"].v)}}
    with Checkpoints(tmp_path / "other", keep=3) as other:
        other.save(2, dataclasses.replace(good, params=params), info())
    (folder / "2" / "state").rename(tmp_path / "aside")
    (tmp_path / "other" / "2" / "state").rename(folder / "2" / "state")
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert restored.step == 1
    assert restored.damaged == {2: "digest of params/dense/kernel/u differs"}


@pytest.mark.parametrize("which", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 6))])
def test_a_truncated_file_is_noticed_and_the_step_set_aside(folder, tmp_path, which):
    cut(data_files(folder / "2")[which])
    with Checkpoints(folder, keep=3) as checkpoints:
        restored = checkpoints.restore(TARGET)
        assert_equal(restored.state, make_state(restored.step))
        if restored.damaged:
            assert checkpoints.steps() == [1]
            assert (tmp_path / "damaged" / "2").is_dir()  # nothing is deleted
            checkpoints.save(2, make_state(2), info())  # and the step can be saved again
            checkpoints.wait()
            assert checkpoints.steps() == [1, 2]


def test_a_changed_record_is_noticed(folder):
    file = folder / "2" / "info" / "metadata"
    text = file.read_text()
    assert '"next_index": 3' in text or '"next_index":3' in text
    file.write_text(text.replace('"next_index": 3', '"next_index": 4').replace('"next_index":3', '"next_index":4'))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(TARGET).damaged == {2: "the record does not match its own digest"}


def test_when_nothing_is_good_nothing_is_moved(folder):
    for step in ("1", "2"):
        for file in data_files(folder / step)[:4]:
            file.write_bytes(b"")
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError, match=r"(?s)no usable checkpoint.*step 2.*step 1"):
            checkpoints.restore(TARGET)
        assert checkpoints.steps() == [1, 2]


def test_read_only_reports_damage_and_moves_nothing(folder):
    emptied(data_files(folder / "2")[0])
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore(TARGET).step == 1
    assert (folder / "2").is_dir()


def test_a_step_that_its_run_deletes_while_they_are_listed_is_no_error(folder, monkeypatch):
    kind, gone = type(epath.Path(folder)), []
    is_dir = kind.is_dir

    def too_late(self):
        there = is_dir(self)
        if self.name == "1" and not gone:
            gone.append(self)
            shutil.rmtree(self)
        return there

    monkeypatch.setattr(kind, "is_dir", too_late)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2]
    assert gone


def test_a_step_that_its_run_deletes_while_it_is_read_is_not_damaged(folder, tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "later") as later:
        later.save(3, make_state(3), info())
    read = Checkpoints._read

    def too_late(self, step, target):
        if step == 2:
            shutil.rmtree(folder / "2")
            shutil.copytree(tmp_path / "later" / "3", folder / "3")
        return read(self, step, target)

    monkeypatch.setattr(Checkpoints, "_read", too_late)
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore(TARGET)
    assert (restored.step, restored.damaged) == (3, {})


def test_a_step_can_be_asked_for_by_its_number(folder):
    emptied(data_files(folder / "2")[0])
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert_equal(checkpoints.restore_step(1, TARGET).state, make_state(1))
        with pytest.raises(CheckpointError, match="checkpoint 2 cannot be used"):
            checkpoints.restore_step(2, TARGET)
        shutil.rmtree(folder / "1")
        assert checkpoints.restore_step(1, TARGET) is None


def test_a_bucket_is_no_folder_here_and_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(CheckpointError, match=r"^gs://bucket/run/checkpoints: checkpoints there need pip install"):
        Checkpoints("gs://bucket/run/checkpoints")
