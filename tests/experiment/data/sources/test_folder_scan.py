"""What is found in a folder, and what is left out, by name."""

import os

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.data.sources.folder_scan import changed, scan

SHARES = (("test", 0.2),)


def write(root, *paths):
    """Small PNGs."""
    for i, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), i % 256, np.uint8)).save(file, "PNG")


def one_level(root, count=50):
    write(root, *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(count)))


def test_folders_below_the_splits_are_the_classes(tmp_path):
    write(tmp_path, "train/b/1.png", "train/a/2.PNG", "train/a/deep/er/3.jpeg", "val/a/1.png", "val/b/1.png")
    found = scan(str(tmp_path), False, SHARES)
    assert found.class_names == ("a", "b") and found.layered
    assert {split: sorted(files.paths) for split, files in found.splits.items()} == {
        "train": ["train/a/2.PNG", "train/a/deep/er/3.jpeg", "train/b/1.png"],
        "val": ["val/a/1.png", "val/b/1.png"],
    }
    for files in found.splits.values():
        for path, label in zip(files.paths, files.labels, strict=True):
            assert found.class_names[label] == path.split("/")[1]
    assert not found.notes and not found.skipped


def test_a_class_may_be_called_like_a_split(tmp_path):
    write(tmp_path, *(f"{kind}/{i}.png" for kind in ("train", "car") for i in range(30)))
    found = scan(str(tmp_path), False, SHARES)
    assert not found.layered and found.class_names == ("car", "train")


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("Train", "Test"), ["train", "test"]),
        (("training_set", "test_set"), ["train", "test"]),
        (("TRAINING", "Testing", "Dev"), ["train", "dev", "test"]),
        (("train", "Val", "extra"), ["train", "extra", "val"]),
    ],
)
def test_splits_are_known_by_their_usual_names(tmp_path, folders, splits):
    write(tmp_path, *(f"{folder}/{kind}/1.png" for folder in folders for kind in ("cat", "dog")))
    found = scan(str(tmp_path), False, SHARES)
    assert found.layered and found.class_names == ("cat", "dog") and [*found.splits] == splits
    assert all((tmp_path / path).is_file() for files in found.splits.values() for path in files.paths)


def test_a_picture_beside_the_classes_of_a_split_is_left_out(tmp_path):
    write(tmp_path, *(f"{split}/{path}" for split in ("train", "val") for path in ("cat/1.png", "dog/1.png", "stray.png")))
    found = scan(str(tmp_path), False, SHARES)
    assert found.layered and found.class_names == ("cat", "dog")
    assert found.skipped == {"not in a class folder": ("train/stray.png", "val/stray.png")}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("train/steam/1.png", "car/1.png"), "is train a split or a class.* and car holds images, as a class does; move"),
        (("train/steam/1.png", "train/1.png", "car/red/1.png"), "is train a split or a class.* and train holds images"),
        (("train/a/1.png", "train/b/1.png", "Train/a/1.png"), "Train and train are both the split train; rename one"),
        (("training_set/a/1.png", "train/b/1.png"), "train and training_set are both the split train; rename one"),
    ],
)
def test_folders_that_could_be_splits_or_classes_are_refused(tmp_path, paths, message):
    write(tmp_path, *paths)
    with pytest.raises(DataError, match=message):
        scan(str(tmp_path), False, SHARES)


def test_an_image_keeps_its_split_and_its_order_when_others_are_added(tmp_path):
    one_level(tmp_path)
    before = scan(str(tmp_path), False, SHARES)
    assert set(before.splits) == {"train", "test"}
    assert 5 <= len(before.splits["test"].paths) <= 40  # 20 of 100, by chance
    write(tmp_path, *(f"cat/new-{i}.png" for i in range(50)), "ant/1.png")
    after = scan(str(tmp_path), False, SHARES)
    for split, files in before.splits.items():
        kept = [path for path in after.splits[split].paths if path in set(files.paths)]
        assert kept == list(files.paths)
    assert before.digest != after.digest


def test_every_part_of_the_order_has_all_classes(tmp_path):
    one_level(tmp_path, 200)
    labels = scan(str(tmp_path), False, ()).splits["train"].labels
    assert labels.dtype == np.int32 and len(labels) == 400
    for part in np.split(labels, 4):
        assert 0.3 < part.mean() < 0.7


def test_the_shares_are_those_asked_for(tmp_path):
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        for i in range(500):
            (tmp_path / kind / f"{i}.png").write_bytes(b"x")
    found = scan(str(tmp_path), False, (("test", 0.2), ("valid", 0.1)))
    sizes = {split: len(files.paths) for split, files in found.splits.items()}
    assert sum(sizes.values()) == 1000
    assert abs(sizes["test"] - 200) < 4 * 12.7 and abs(sizes["valid"] - 100) < 4 * 9.5  # four standard deviations


def test_what_is_no_image_is_counted_and_named(tmp_path):
    one_level(tmp_path)
    write(tmp_path, "cat/.hidden.png", ".trash/x.png", "loose.png")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cat" / "Thumbs.db").write_text("x")
    (tmp_path / "dog" / "empty.png").touch()
    (tmp_path / "emu").mkdir()
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    found = scan(str(tmp_path), False, SHARES)
    assert {reason: set(names) for reason, names in found.skipped.items()} == {
        "hidden": {".trash", "cat/.hidden.png"},
        "not in a class folder": {"loose.png"},
        "not images": {"cat/notes.txt", "cat/Thumbs.db"},
        "empty files": {"dog/empty.png"},
        "not plain files": {"dog/pipe.png"},
        "class folders without images": {"emu"},
    }
    [note] = found.notes
    assert "2 not images (cat/Thumbs.db, cat/notes.txt)" in note and "1 class folders without images (emu)" in note
    assert found.class_names == ("cat", "dog")


def test_links_are_left_out_unless_they_are_to_be_followed(tmp_path):
    one_level(tmp_path / "data")
    write(tmp_path, "outside/secret.png")
    (tmp_path / "data" / "dog" / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (tmp_path / "data" / "fox").symlink_to(tmp_path / "outside")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    without = scan(str(tmp_path / "data"), False, SHARES)
    [(reason, names)] = without.skipped.items()
    assert reason.startswith("symbolic links") and set(names) == {"dog/link.png", "fox", "cat/loop", "cat/gone.png"}
    assert without.class_names == ("cat", "dog")
    followed = scan(str(tmp_path / "data"), True, SHARES)
    assert followed.class_names == ("cat", "dog", "fox")
    assert {"dog/link.png", "fox/secret.png"} <= {path for files in followed.splits.values() for path in files.paths}
    assert followed.skipped == {"links in a circle": ("cat/loop",), "broken links": ("cat/gone.png",)}


def test_names_that_are_no_text_are_read_and_shown(tmp_path):
    write(tmp_path, *(f"train/{kind}/{i}.png" for kind in "ab" for i in range(3)))
    strange = os.fsdecode(b"\xff\x1b[31m\n")
    (tmp_path / "train" / "a").rename(tmp_path / "train" / strange)
    (tmp_path / "train" / strange / f"{strange}.txt").touch()
    (tmp_path / "train" / strange / "0.png").rename(tmp_path / "train" / strange / f"{strange}.png")
    (tmp_path / strange / "b").mkdir(parents=True)
    write(tmp_path, f"{strange}/b/0.png")
    found = scan(str(tmp_path), False, SHARES)
    assert all(name.encode() for name in found.class_names)
    assert all(note.isprintable() for note in found.notes) and len(found.notes) == 2
    assert all((tmp_path / path).is_file() for files in found.splits.values() for path in files.paths)


def test_a_class_that_one_split_lacks_is_named(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png")
    assert scan(str(tmp_path), False, SHARES).notes == (
        "no examples of c in the split train",
        "no examples of b in the split val",
    )


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), "holds no images in class folders; expected CLASS/IMAGE"),
        (("a.png",), r"holds no images in class folders.*; left out: 1 not in a class folder \(a.png\)"),
        (("cat/1.png",), "holds one class, 'cat'; a network needs two to tell apart"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, paths, message):
    write(tmp_path, *paths)
    with pytest.raises(DataError, match=message):
        scan(str(tmp_path), False, SHARES)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        scan(str(tmp_path / "nowhere"), False, SHARES)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is not a folder"):
        scan(str(tmp_path / "file"), False, SHARES)


def test_the_digest_follows_names_sizes_and_splits(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    found = scan(str(tmp_path), False, SHARES)
    assert scan(str(tmp_path), False, SHARES).digest == found.digest
    digests = {found.digest}
    (tmp_path / "train/a/1.png").rename(tmp_path / "train/a/2.png")
    digests.add(scan(str(tmp_path), False, SHARES).digest)
    with (tmp_path / "train/a/2.png").open("ab") as file:
        file.write(b"x")
    digests.add(scan(str(tmp_path), False, SHARES).digest)
    (tmp_path / "train/a/2.png").rename(tmp_path / "val/a/2.png")
    write(tmp_path, "train/a/1.png")
    digests.add(scan(str(tmp_path), False, SHARES).digest)
    assert len(digests) == 4


def test_a_change_below_is_seen_without_looking_at_every_file(tmp_path):
    one_level(tmp_path)
    found = scan(str(tmp_path), False, SHARES)
    assert changed(found) == found.times
    os.utime(tmp_path / "cat", ns=(0, 0))
    assert changed(found) != found.times
