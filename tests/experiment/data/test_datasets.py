import os
import pathlib
import shutil

import numpy as np
import pytest

from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.data.datasets import describe, find, load
from lowrank_jax.experiment.data.sources.synthetic import SyntheticOptions
from lowrank_jax.experiment.data.splits import split_parts, split_size
from lowrank_jax.experiment.memory import TooLarge


def test_digits_come_whole_through_the_real_builder():
    digits = describe("digits", {})
    train, test = (load(digits, split, None) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 8, 8, 1) and train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    pixels = train.images / 255
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [digits.mean[0], digits.std[0]], atol=2e-3)

    from sklearn.datasets import load_digits

    everything, labels = load_digits(return_X_y=True)
    ours = np.concatenate([train.images, test.images]).reshape(-1, 64) / 255 * 16
    order, theirs = np.lexsort(ours.round().T), np.lexsort(everything.T)
    np.testing.assert_array_equal(ours.round()[order], everything[theirs])
    assert sorted(np.concatenate([train.labels, test.labels])) == sorted(labels)


def test_the_second_reading_finds_decoded_pixels_and_survives_their_loss():
    digits = describe("digits", {})
    first = load(digits, "test", None)
    cache = next(p for p in pathlib.Path(os.environ["TFDS_DATA_DIR"]).glob("digits/*/decoded-test.npz"))
    np.testing.assert_array_equal(load(digits, "test", None).images, first.images)
    cache.write_bytes(cache.read_bytes()[:1000])
    np.testing.assert_array_equal(load(digits, "test", None).images, first.images)


def test_digits_are_not_made_in_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.data_dir: .*/nowhere is not a folder; make it, or leave the setting out"):
        load(describe("digits", {}), "test", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


DAMAGE = {
    "cut short": lambda info: info.write_bytes(info.read_bytes()[:100]),
    "empty": lambda info: info.write_text(""),
    "no text": lambda info: info.write_bytes(b"\xff\xfe"),
    "another": lambda info: info.write_text("[]"),
    "gone": lambda info: info.unlink(),
    "a folder": lambda info: (info.unlink(), info.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_of_the_digits_is_named(tmp_path, damage):
    shutil.copytree(pathlib.Path(os.environ["TFDS_DATA_DIR"]) / "digits", tmp_path / "digits")
    damage(next(tmp_path.glob("digits/*/dataset_info.json")))
    with pytest.raises(DataError, match=rf"dataset_info.json is (missing|damaged); delete {tmp_path}/digits/.*, then: "):
        load(describe("digits", {}), "test", str(tmp_path))


def flip_bytes(folder):
    records = next(folder.glob("*-test.array_record-00000-of-00001"))
    data = bytearray(records.read_bytes())
    data[30_000:30_002] = bytes(byte ^ 0xFF for byte in data[30_000:30_002])  # among records: the header is checked first
    records.write_bytes(data)


def take_another_split(folder):
    shutil.copy(*(next(folder.glob(f"*-{split}.array_record-00000-of-00001")) for split in ("train", "test")))


RECORDS = {
    "flipped bytes": (flip_bytes, "records of test cannot be read"),
    "another split's": (take_another_split, "1,437 records"),
}


@pytest.mark.parametrize(("damage", "said"), RECORDS.values(), ids=RECORDS)
def test_damage_of_the_records_is_named(tmp_path, damage, said):
    shutil.copytree(pathlib.Path(os.environ["TFDS_DATA_DIR"]) / "digits", tmp_path / "digits")
    (folder,) = (path.parent for path in tmp_path.glob("digits/*/dataset_info.json"))
    for decoded in folder.glob("decoded-*"):
        decoded.unlink()
    damage(folder)
    with pytest.raises(DataError, match=rf"{said}.*; delete {tmp_path}/digits/.*, then: "):
        load(describe("digits", {}), "test", str(tmp_path))


def test_digits_that_cannot_be_made_are_one_line(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.download_and_prepare", full)
    with pytest.raises(DataError, match=rf"{tmp_path}/digits/.* cannot be made: .*No space left"):
        load(describe("digits", {}), "test", str(tmp_path))


def test_a_data_set_may_not_name_code_in_its_files(tmp_path):
    """TFDS would import the class that features.json names, were the data set not one of those it knows."""
    shutil.copytree(pathlib.Path(os.environ["TFDS_DATA_DIR"]) / "digits", tmp_path / "digits")
    features = next(tmp_path.glob("digits/*/features.json"))
    features.write_text(features.read_text().replace("tensorflow_datasets.core", "no.such.module"))
    assert len(load(describe("digits", {}), "test", str(tmp_path))) == 360


def test_objects_are_not_unpickled(tmp_path):
    shutil.copytree(pathlib.Path(os.environ["TFDS_DATA_DIR"]) / "digits", tmp_path / "digits")
    whole = load(describe("digits", {}), "test", str(tmp_path))
    cache = next(tmp_path.glob("digits/*/decoded-test.npz"))
    np.savez(cache, images=np.array([Bomb()] * 360, object), labels=whole.labels)
    np.testing.assert_array_equal(load(describe("digits", {}), "test", str(tmp_path)).images, whole.images)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_more_images_than_memory_are_refused():
    dataset = describe("synthetic", {"train_size": 10**10})
    with pytest.raises(
        TooLarge, match=r"out of memory: the 10,000,000,000 images of synthetic/train: 30\.7TB; this machine has"
    ):
        load(dataset, "train[:10]", None)


def test_parts_of_a_split_are_disjoint_and_complete():
    digits = describe("digits", {})
    assert split_parts(digits, "train[:90%]") == [("train", 0, 1293)]
    assert split_parts(digits, "train[90%:]+test") == [("train", 1293, 1437), ("test", 0, 360)]
    assert split_size(digits, "train[:100]") == 100
    whole, head, tail = (load(digits, split, None) for split in ("train", "train[:90%]", "train[90%:]"))
    np.testing.assert_array_equal(np.concatenate([head.labels, tail.labels]), whole.labels)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tset", "has no split 'tset'; did you mean test"),
        ("train[:x]", "cannot be parsed"),
        ("train[:0]", "contains an empty slice"),
        ("train[10:5]", r"'train\[10:5\]' contains an empty slice; its end must come after its start"),
        ("test+train[50%:20%]", "contains an empty slice"),
        ("train[:10shard]", r"uses shards; slice by examples or per cent, as in train\[:10%\]"),
    ],
)
def test_bad_splits_are_named(split, message):
    with pytest.raises(ValueError, match=message):
        split_parts(describe("digits", {}), split)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_a_data_set_that_is_not_there_says_how_to_get_it(name, tmp_path):
    with pytest.raises(DataError, match=rf"{name} is not prepared under {tmp_path}; run: .*{tmp_path}"):
        load(describe(name, {}), "train", str(tmp_path))


def test_an_unknown_data_set_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"^unknown 'fashion_mnits'; did you mean fashion_mnist"):
        find("fashion_mnits")


def test_synthetic_images_follow_their_options():
    options = {"image_shape": (4, 5, 2), "num_classes": 3, "train_size": 30, "test_size": 7}
    assert SyntheticOptions(**options).num_classes == 3
    dataset = describe("synthetic", options)
    train, test = load(dataset, "train", None), load(dataset, "test", None)
    assert train.images.shape == (30, 4, 5, 2) and len(test) == 7
    assert set(train.labels) <= {0, 1, 2}
    assert not np.array_equal(train.images[:7], test.images)
