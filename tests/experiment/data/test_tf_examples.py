"""ImageNet in small: what is read, in which order, and what becomes of damaged images."""

import dataclasses
import io
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.base import DataError, Decoding
from lowrank_jax.experiment.data.datasets import describe, load
from lowrank_jax.experiment.data.pipeline import EvalBatches, Feed, Shard, TrainBatches
from lowrank_jax.experiment.data.prepare import prepare
from tests.imagenet_files import (
    WORDNET_IDS,
    jpeg,
    names,
    natural_images,
    prepare_small,
    stored_records,
    write_archives,
)
from tests.running import ROOT

VARIED = Augmentation((0.08, 1.0), flip=True, randaugment_layers=2, randaugment_magnitude=9.0)
SIZE = 48


def opened(small, split, **decoding):
    return load(described(small, **decoding), split, str(small.data_dir))


def described(small, **decoding):
    return describe("imagenet2012", small.kwargs, image_size=SIZE, decoding=Decoding(**decoding))


def test_every_image_is_there_with_its_label(small_imagenet):
    train = opened(small_imagenet, "train")
    assert len(train) == small_imagenet.train
    batch = train.plain(np.arange(len(train)))
    assert batch["image"].shape == (len(train), SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32 and batch["mask"].dtype == np.float32
    for i, name in enumerate(names(small_imagenet, "train")):
        if name == small_imagenet.truncated["train"]:
            assert batch["mask"][i] == 0 and train.undecodable == {i: name}
            continue
        assert WORDNET_IDS[batch["label"][i]] == name.split("_")[0]  # they are the first ones of the thousand
        image = Image.open(io.BytesIO(small_imagenet.images[name]))
        side = round(0.875 * min(image.size))
        left, top = ((length - side) // 2 for length in image.size)
        box = (left, top, left + side, top + side)
        theirs = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)).astype(float)
        assert np.abs(batch["image"][i] - theirs).mean() < 5  # tests/experiment/data/test_decode.py says more


def test_an_example_has_the_same_pixels_in_any_batch_on_any_process_ahead_of_time_or_not(small_imagenet):
    train = opened(small_imagenet, "train")
    whole = TrainBatches(train, 16, 12, 3, VARIED)
    expected = [whole[i] for i in range(12)]  # three epochs
    small = TrainBatches(train, 4, 48, 3, VARIED)
    parts = [TrainBatches(train, 16, 12, 3, VARIED, Shard((i,), 4)) for i in range(4)]
    ahead = Feed(whole)
    for i, batch in enumerate(expected):
        again = [
            next(ahead),
            joined([small[j] for j in range(4 * i, 4 * i + 4)]),
            joined([part[i] for part in parts]),
            TrainBatches(opened(small_imagenet, "train"), 16, 12, 3, VARIED)[i],
        ]
        for other in again:
            np.testing.assert_array_equal(other["image"], batch["image"])
            np.testing.assert_array_equal(other["label"], batch["label"])
    first, second = (np.concatenate([b["image"] for b in expected[i : i + 4]]) for i in (0, 4))
    assert len({image.tobytes() for image in (*first, *second)}) >= 2 * small_imagenet.train - 4  # new every epoch


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_the_iterator_goes_on_where_its_state_says(small_imagenet):
    batches = TrainBatches(opened(small_imagenet, "train"), 8, 100, 3, VARIED)
    first = Feed(batches)
    for _ in range(5):
        next(first)
    state = first.get_state()
    expected = [next(first) for _ in range(6)]
    second = Feed(batches)
    next(second)  # it has read ahead by then
    second.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(second)["image"], batch["image"])


def test_parts_of_a_split_are_the_stored_records_of_it(small_imagenet):
    whole, part = (opened(small_imagenet, split) for split in ("train", "train[20:30]+validation[:5]"))
    assert len(part) == 15
    index = np.arange(10)
    np.testing.assert_array_equal(part.plain(index)["image"], whole.plain(index + 20)["image"])
    validation = opened(small_imagenet, "validation").plain(np.arange(5))
    np.testing.assert_array_equal(part.plain(np.arange(10, 15))["label"], validation["label"])


@pytest.mark.parametrize("batch_size", [5, 24, 64])
@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_meets_every_image_that_decodes_once(small_imagenet, batch_size, count):
    validation = opened(small_imagenet, "validation")
    everything = validation.plain(np.arange(len(validation)))
    expected = sorted(image.tobytes() for image, mask in zip(everything["image"], everything["mask"], strict=True) if mask)
    seen = []
    for index in range(count):
        for batch in EvalBatches(validation, batch_size * count, Shard((index,), count)):
            assert len(batch["image"]) == batch_size
            seen += [image.tobytes() for image, mask in zip(batch["image"], batch["mask"], strict=True) if mask]
    assert sorted(seen) == expected and len(seen) == small_imagenet.validation - 1


def test_an_image_that_does_not_decode_is_named_once_and_the_next_one_takes_its_place(small_imagenet, capfd):
    train, stored = opened(small_imagenet, "train"), names(small_imagenet, "train")
    broken = stored.index(small_imagenet.truncated["train"])
    bits = np.array([7, 7, 8], np.uint64)
    batch = train.augmented(np.array([broken, (broken + 1) % len(train), broken]), bits, VARIED)
    np.testing.assert_array_equal(batch["image"][0], batch["image"][1])
    assert batch["label"][0] == batch["label"][1] == batch["label"][2]
    said = capfd.readouterr().err
    assert said.count("imagenet2012/train: n01443537_3.JPEG cannot be decoded (image file is truncated") == 1
    assert "1 of at most 10 so far" in said
    assert train.undecodable == {broken: stored[broken]}


def test_too_many_of_them_end_the_run_by_name(small_imagenet):
    train = opened(small_imagenet, "train", max_undecodable=0)
    with pytest.raises(
        DataError, match=r"1 images cannot be decoded, more than dataset.max_undecodable=0: n01443537_3.JPEG\. Raise"
    ):
        for _ in Feed(TrainBatches(train, 16, 8, 0, VARIED)):
            pass


def test_a_batch_that_cannot_be_read_is_known_of_before_its_turn(small_imagenet):
    train = opened(small_imagenet, "train", max_undecodable=0)
    feed, known = Feed(TrainBatches(train, 4, 64, 0, VARIED), ahead=3), []
    with pytest.raises(DataError):
        for _ in feed:
            known.append(feed.error is not None)
    assert known[-3:] == [True] * 3 and not any(known[:-3])


def test_where_nothing_is_prepared_the_command_is_named(small_imagenet, tmp_path):
    command = rf"scripts/prepare_imagenet.sh MANUAL_DIR {tmp_path}"
    with pytest.raises(DataError, match=rf"imagenet2012 is not prepared under {tmp_path}; run: {command}"):
        load(described(small_imagenet), "train", str(tmp_path))
    with pytest.raises(DataError, match=rf"imagenet_v2 is not prepared under {tmp_path}; run: tfds build imagenet_v2"):
        load(describe("imagenet_v2", {}), "test", str(tmp_path))


def test_a_part_of_it_has_to_be_meant(small_imagenet):
    message = (
        r"imagenet2012/validation under .* has 24 examples, 50,000 expected; delete .*, then: .*prepare_imagenet.sh MANUAL_DIR"
        r'.*; if the subset is meant, set dataset.kwargs to \{"validation_size": 24\}'
    )
    with pytest.raises(DataError, match=message):
        load(describe("imagenet2012", {}), "validation", str(small_imagenet.data_dir))


@pytest.fixture
def copy(small_imagenet, tmp_path):
    shutil.copytree(small_imagenet.data_dir, tmp_path / "data")
    return dataclasses.replace(small_imagenet, data_dir=tmp_path / "data")


def test_a_file_that_is_missing_or_cut_short_is_named(copy):
    file = next(copy.data_dir.glob("imagenet2012/*/*train*"))
    content = file.read_bytes()
    file.unlink()
    remedy = f"; delete {file.parent}, then: scripts/prepare_imagenet.sh MANUAL_DIR {copy.data_dir}"
    with pytest.raises(DataError, match=rf"lacks 1 of 1 files, such as {file.name}{remedy}"):
        opened(copy, "train")
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"imagenet2012/train: record \d+ cannot be read .*{remedy}"):
        opened(copy, "train").plain(np.arange(copy.train))


def write_info(text):
    return lambda folder: (folder / "dataset_info.json").write_bytes(text)


def shorten(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "dataset_info.json is missing": lambda folder: (folder / "dataset_info.json").unlink(),
    "dataset_info.json is damaged": write_info(b""),
    "dataset_info.json is damaged ": write_info(b'{"name": "imag'),
    "dataset_info.json is damaged  ": write_info(b"{}"),
    "dataset_info.json is damaged    ": write_info(b'{"name": "imagenet2012", "version": "5.1.0", "splits": 3}'),
    "dataset_info.json is damaged   ": write_info(b"\xff\xfe\0"),
    "lacks 1 of 1 files": lambda folder: next(folder.glob("*train*")).unlink(),
    "00000-of-00001 is damaged": lambda folder: shorten(next(folder.glob("*validation*"))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_taken_for_complete_by_training_or_by_preparing(copy, damage):
    (folder,) = copy.data_dir.glob("imagenet2012/*")
    DAMAGES[damage](folder)
    if "lacks" not in damage and "00001" not in damage:
        with pytest.raises(DataError) as caught:
            opened(copy, "train")
        command = f"scripts/prepare_imagenet.sh MANUAL_DIR {copy.data_dir}"
        assert str(caught.value) == f"{folder}/{damage.strip()}; delete {folder}, then: {command}"
    with pytest.raises(SystemExit, match=rf"{damage.strip()}.*; delete {folder}, then run this command again"):
        prepare("imagenet2012", copy.data_dir / "archives", str(copy.data_dir))


def test_paths_in_commands_are_quoted(copy, tmp_path):
    spaced = dataclasses.replace(copy, data_dir=copy.data_dir.rename(tmp_path / "my data"))
    next(spaced.data_dir.glob("imagenet2012/*/*train*")).unlink()
    message = rf"delete '{tmp_path}/my data/imagenet2012/.*', then: scripts/prepare_imagenet.sh MANUAL_DIR '{tmp_path}/my data'"
    with pytest.raises(DataError, match=message):
        opened(spaced, "train")


@pytest.mark.parametrize("pattern", ["imagenet2012/*", "imagenet2012/*/*train*", "imagenet2012/*/dataset_info.json"])
def test_what_may_not_be_read_is_a_matter_of_permission(copy, pattern):
    (path,) = copy.data_dir.glob(pattern)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("whoever runs this may read everything")
    try:
        with pytest.raises(DataError, match=f"{path}: Permission denied; this user needs permission to read it"):
            opened(copy, "train")
        with pytest.raises(SystemExit, match=f"{path}: Permission denied; this user needs permission to read it"):
            prepare("imagenet2012", copy.data_dir / "archives", str(copy.data_dir))
    finally:
        path.chmod(0o700)


def test_a_preparation_that_was_interrupted_leaves_nothing_that_is_taken_for_data(copy):
    (version,) = copy.data_dir.glob("imagenet2012/*.*.*")
    version.rename(version.with_name(f"incomplete.ABCDEF_{version.name}"))
    with pytest.raises(DataError, match="is not prepared under"):
        opened(copy, "train")


def test_data_in_another_format_is_refused(copy):
    for file in copy.data_dir.glob("imagenet2012/*/*"):
        if file.name == "dataset_info.json":
            file.write_text(file.read_text().replace("array_record", "tfrecord"))
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))
    with pytest.raises(
        DataError, match=rf"prepared under {copy.data_dir}, but not as array_record; prepare it in another folder"
    ):
        opened(copy, "train")


def test_another_number_of_classes_is_refused(small_imagenet):
    dataset = dataclasses.replace(described(small_imagenet), num_classes=10)
    with pytest.raises(DataError, match="has 1000 classes, 10 expected"):
        load(dataset, "train", str(small_imagenet.data_dir))


def test_to_look_whether_it_is_there_reads_nothing(small_imagenet, monkeypatch):
    from lowrank_jax.experiment.data.tf_examples import TFExamples

    monkeypatch.setattr(TFExamples, "__getitem__", lambda *_: pytest.fail("a record was read"))
    assert len(datasets.load(described(small_imagenet), "train[:10]", str(small_imagenet.data_dir))) == 10


def test_what_is_prepared_already_is_counted_and_a_part_of_it_is_pointed_out(small_imagenet, capsys):
    prepare("imagenet2012", small_imagenet.data_dir.parent / "archives", str(small_imagenet.data_dir))
    said = capsys.readouterr()
    assert f"is ready in {small_imagenet.data_dir}/imagenet2012/5.1.0: 64 examples of train, 24 examples of val" in said.out
    assert 'set dataset.kwargs to {"train_size": 64, "validation_size": 24}' in said.err


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    images = [jpeg(image) for image in natural_images(12, side=64)]
    write_archives(folder, images[:8], images[8:])
    return {part: (folder / f"ILSVRC2012_img_{part}.tar").read_bytes() for part in ("train", "val")}


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("what", ["html", "empty", "half"])
def test_archives_that_are_none_are_named(archives, tmp_path, part, what):
    broken = {"html": b"<html>", "empty": b"", "half": archives[part][: len(archives[part]) // 2 - 100]}[what]
    for name, content in {**archives, part: broken}.items():
        (tmp_path / f"ILSVRC2012_img_{name}.tar").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"imagenet2012: the files in {tmp_path} are not the published ones \("):
        prepare("imagenet2012", tmp_path, str(tmp_path / "data"))


def test_missing_archives_are_listed(tmp_path):
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    message = rf"{tmp_path} does not contain ILSVRC2012_img_train\.tar; download them from https://image-net\.org"
    with pytest.raises(SystemExit, match=message):
        prepare("imagenet2012", tmp_path, str(tmp_path / "data"))


@pytest.mark.slow
class TestBuilder:
    """The script, which runs TFDS's builder in a process of its own."""

    def run(self, folder, archives):
        for part, data in archives.items():
            (folder / f"ILSVRC2012_img_{part}.tar").write_bytes(data)
        return self.call(str(folder), str(folder / "data"))

    def call(self, *arguments):
        return subprocess.run([ROOT / "scripts" / "prepare_imagenet.sh", *arguments], capture_output=True, text=True)

    def test_it_leaves_the_records_that_the_other_tests_write(self, small_imagenet, tmp_path):
        built = prepare_small(tmp_path)
        for split in ("train", "validation"):
            theirs, ours = (sorted(map(without_their_labels, stored_records(s, split))) for s in (built, small_imagenet))
            assert theirs == ours
        files, written = (sorted(f.name for f in s.data_dir.glob("imagenet2012/*/*")) for s in (built, small_imagenet))
        assert files == written
        assert opened(built, "train").plain(np.arange(built.train))["mask"].sum() == built.train - 1

    def test_archives_that_are_none_are_named(self, archives, tmp_path):
        done = self.run(tmp_path, {**archives, "val": b"<html>"})
        assert done.returncode == 1
        assert f"the files in {tmp_path} are not the published ones (" in done.stderr and "Traceback" not in done.stderr

    def test_what_was_prepared_is_counted_and_a_part_of_it_is_pointed_out(self, archives, tmp_path):
        done = self.run(tmp_path, archives)
        assert done.returncode == 0, done.stderr
        assert f"is ready in {tmp_path}/data/imagenet2012/5.1.0: 8 examples of train, 4 examples of validation" in done.stdout
        expected = "imagenet2012 should have 1,281,167 examples of train, 50,000 examples of validation"
        assert expected in done.stderr
        assert 'set dataset.kwargs to {"train_size": 8, "validation_size": 4}' in done.stderr

    def test_missing_archives_are_listed(self, tmp_path):
        (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
        done = self.call(str(tmp_path), str(tmp_path / "data"))
        assert done.returncode == 1
        assert f"{tmp_path} does not contain ILSVRC2012_img_train.tar; download them from https://image-net.org" in done.stderr
        assert "Traceback" not in done.stderr
        assert self.call().stderr.startswith("usage: ")


def without_their_labels(record):
    """A record's image, name and, of a training image, its label: the builder has a list of those of the validation images."""
    features = tf_example_pb2.Example.FromString(record).features.feature
    name = features["file_name"].bytes_list.value[0].decode()
    label = features["label"].int64_list.value[0] if name.startswith("n") else None
    return name, label, features["image"].bytes_list.value[0]
