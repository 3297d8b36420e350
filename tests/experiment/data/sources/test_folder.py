"""Folders of images as data sets: against Pillow's values, and what a run is promised of its data."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.base import DataError, Decoding
from lowrank_jax.experiment.data.kept import look_again
from lowrank_jax.experiment.data.pipeline import EvalBatches, Feed, Shard, TrainBatches
from tests.imagenet_files import jpeg, natural_images

VARIED = Augmentation((0.08, 1.0), flip=True, randaugment_layers=2, randaugment_magnitude=9.0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Class folders of JPEGs of many sizes; one is cut short."""
    root = tmp_path_factory.mktemp("photographs")
    for i, image in enumerate(natural_images(60, side=80)):
        kind = root / ("even", "odd")[i % 2]
        kind.mkdir(exist_ok=True)
        image = image.crop((0, 0, image.width - i % 7, image.height - i % 5))
        (kind / f"{i}.jpg").write_bytes(jpeg(image))
    broken = root / "odd" / "11.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    return root


@pytest.fixture
def small(tmp_path):
    """Images of 8 by 6 pixels, by class the colours red and blue; with a test split of two."""
    for split, count in (("train", 20), ("test", 2)):
        for i in range(count):
            kind = tmp_path / split / ("blue", "red")[i % 2]
            kind.mkdir(parents=True, exist_ok=True)
            values = np.zeros((6, 8, 3), np.uint8)
            values[..., 2 if kind.name == "blue" else 0] = 100 + i
            Image.fromarray(values).save(kind / f"{i}.png")
    return tmp_path


def described(root, image_size=None, **kwargs):
    look_again()
    return datasets.describe(f"folder:{root}", kwargs, image_size=image_size, decoding=Decoding(0.875, 3))


def whole(split):
    batch = split.plain(np.arange(len(split)))
    return [image for image, mask in zip(batch["image"], batch["mask"], strict=True) if mask]


def test_small_images_of_one_size_are_kept_in_memory_as_they_are(small):
    dataset = described(small)
    assert dataset.image_shape == (6, 8, 3) and dataset.sizes == {"train": 20, "test": 2} and dataset.whole
    assert dataset.class_names == ("blue", "red") and dataset.mean == ()
    assert any("kept in memory" in note for note in dataset.notes)
    train = datasets.load(dataset, "train", None)
    batch = train.plain(np.arange(20))
    np.testing.assert_array_equal(batch["image"].max(axis=(1, 2)).argmax(1), np.where(batch["label"] == 0, 2, 0))
    assert sorted(image.max() for image in batch["image"]) == [*range(100, 120)]
    half = datasets.load(dataset, "train[:50%]", None)
    np.testing.assert_array_equal(half.images, train.images[:10])


def test_images_of_many_sizes_are_cropped(photographs):
    dataset = described(photographs, image_size=32)
    assert dataset.cropped and dataset.image_shape == (32, 32, 3)
    assert any("read from disk" in note for note in dataset.notes)
    assert described(photographs).image_shape == (224, 224, 3)


def test_images_that_are_to_be_in_memory_must_have_one_size(photographs, small):
    with pytest.raises(
        DataError, match=r"dataset\.kwargs\.in_memory: .* pixels, and .*; images that are kept in memory must have"
    ):
        described(photographs, in_memory=True)
    assert described(small, in_memory=False).cropped
    assert described(small, image_size=16).image_shape == (16, 16, 3)


def test_pixels_are_pillows_by_name(photographs):
    dataset = described(photographs, image_size=24)
    train = datasets.load(dataset, "train", None)
    paths = datasets.find(dataset.name) and train._examples._paths
    batch = train.plain(np.arange(len(train)))
    for path, image, mask in zip(paths, batch["image"], batch["mask"], strict=True):
        if not mask:
            assert path == "odd/11.jpg"
            continue
        stored = Image.open(photographs / path)
        side = round(0.875 * min(stored.size))
        left, top = ((length - side) // 2 for length in stored.size)
        theirs = stored.resize((24, 24), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        assert np.abs(image - np.asarray(theirs).astype(float)).mean() < 5


def test_batches_are_a_function_of_seed_epoch_and_index(photographs):
    train = datasets.load(described(photographs, image_size=24), "train", None)
    batches = TrainBatches(train, 16, 8, 3, VARIED)
    again = TrainBatches(datasets.load(described(photographs, image_size=24), "train", None), 16, 8, 3, VARIED)
    parts = [TrainBatches(train, 16, 8, 3, VARIED, Shard((i,), 2)) for i in range(2)]
    feed = Feed(batches)
    for i in range(8):
        expected = batches[i]
        joined = {key: np.concatenate([part[i][key] for part in parts]) for key in expected}
        for other in (next(feed), again[i], joined):
            for key in expected:
                np.testing.assert_array_equal(other[key], expected[key])


def test_evaluation_meets_every_image_once_and_names_what_does_not_decode(photographs, capfd):
    dataset = described(photographs, image_size=24, test_share=0.5)
    seen = 0
    for split in ("train", "test"):
        images = datasets.load(dataset, split, None)
        batches = list(EvalBatches(images, 7))
        seen += sum(int(batch["mask"].sum()) for batch in batches)
    assert seen == 59
    said = capfd.readouterr().err
    assert said.count("odd/11.jpg cannot be decoded (image file is truncated") == 1


def test_in_memory_too_an_undecodable_image_is_named_and_replaced(small, capfd):
    broken = small / "train" / "red" / "5.png"
    broken.write_bytes(broken.read_bytes()[:50])
    train = datasets.load(described(small), "train", None)
    assert (
        list(train.undecodable.values()) == ["train/red/5.png"]
        and "train/red/5.png cannot be decoded" in capfd.readouterr().err
    )
    [index] = train.undecodable
    assert sorted(train.all_labels()) == [0] * 10 + [1] * 10  # it counts in its class all the same
    assert train.plain(np.arange(20))["mask"].sum() == 19 and not train.plain(np.array([index]))["mask"][0]
    bits = np.zeros(2, np.uint64)
    batch = train.augmented(np.array([index, (index + 1) % 20]), bits, Augmentation())
    np.testing.assert_array_equal(batch["image"][0], batch["image"][1])
    for i in (1, 7, 9, 11):
        file = small / "train" / "red" / f"{i}.png"
        file.write_bytes(b"not an image")
    with pytest.raises(
        DataError, match=r"[45] images cannot be decoded, more than dataset\.max_undecodable=3: .*mend or remove"
    ):
        datasets.load(described(small), "train", None)


def encode(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def folder_of(root, data, suffix):
    for kind in ("a", "b"):
        (root / "train" / kind).mkdir(parents=True)
        (root / "train" / kind / f"1.{suffix}").write_bytes(data)
    return root


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_exif_orientation_is_applied_or_ignored(tmp_path, number, kind, suffix):
    image = natural_images(1, side=40)[0].crop((0, 0, 32, 24))
    exif = Image.Exif()
    exif[274] = number
    folder_of(tmp_path, encode(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})), suffix)
    stored = Image.open(tmp_path / f"train/a/1.{suffix}")
    upright, plain = np.asarray(ImageOps.exif_transpose(stored)), np.asarray(stored)
    for exif, expected in ((True, upright), (False, plain)):
        dataset = described(tmp_path, exif=exif)
        assert dataset.image_shape == expected.shape
        np.testing.assert_array_equal(whole(datasets.load(dataset, "train", None))[0], expected)
    # The same of a crop: turned after it is cut out, to be as fast.
    turned = whole(datasets.load(described(tmp_path, image_size=16), "train", None))[0].astype(float)
    side, (height, width) = round(0.875 * 24), upright.shape[:2]
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    theirs = Image.fromarray(upright).resize((16, 16), Image.Resampling.BILINEAR, box=box)
    assert np.abs(turned - np.asarray(theirs)).mean() < 3
    (tmp_path / "train").rename(tmp_path / "done")


def test_a_tiff_is_turned_as_pillow_does_it(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    folder_of(tmp_path, encode(natural_images(1, side=40)[0].crop((0, 0, 32, 24)), "TIFF", exif=exif), "tiff")
    expected = np.asarray(Image.open(tmp_path / "train/a/1.tiff"))
    np.testing.assert_array_equal(whole(datasets.load(described(tmp_path), "train", None))[0], expected)


def kinds():
    """Encoded images of all kinds of colours, and what they are in RGB."""
    rgb = natural_images(1, side=40)[0].crop((0, 0, 20, 16))
    values = np.asarray(rgb)
    half = np.dstack([values, np.where(np.arange(20) < 10, 255, 0)[None].repeat(16, 0).astype(np.uint8)])
    on_white, on_black = values.copy(), values.copy()
    on_white[:, 10:], on_black[:, 10:] = 255, 0
    ramp = np.linspace(0, 65535, 320).round().astype(np.uint16).reshape(16, 20)
    grey16 = np.repeat((ramp // 256).astype(np.uint8)[..., None], 3, 2)
    palette = rgb.quantize(16)
    cmyk = rgb.convert("CMYK")
    yield "bmp", encode(rgb, "BMP"), {}, values
    yield "png", encode(rgb.convert("L"), "PNG"), {}, np.repeat(np.asarray(rgb.convert("L"))[..., None], 3, 2)
    yield "png", encode(palette, "PNG"), {}, np.asarray(palette.convert("RGB"))
    yield "tif", encode(cmyk, "TIFF"), {}, np.asarray(cmyk.convert("RGB"))
    stored = encode(cmyk, "JPEG", quality=95)
    yield "jpg", stored, {}, np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
    yield "png", encode(Image.fromarray(half), "PNG"), {}, on_white
    yield "png", encode(Image.fromarray(half), "PNG"), {"alpha": "black"}, on_black
    yield "png", encode(Image.fromarray(half), "PNG"), {"alpha": "drop"}, values
    yield "png", encode(Image.fromarray(ramp), "PNG"), {}, grey16
    yield "tif", encode(Image.fromarray(ramp), "TIFF"), {}, grey16
    yield (
        "gif",
        encode(palette, "GIF", save_all=True, append_images=[Image.new("P", rgb.size)]),
        {},
        np.asarray(palette.convert("RGB")),
    )
    yield "webp", encode(rgb, "WEBP", lossless=True), {}, values
    yield "png", encode(rgb.convert("1"), "PNG"), {}, np.asarray(rgb.convert("1").convert("RGB"))
    yield "png", encode(rgb, "PNG"), {"channels": 1}, np.asarray(rgb.convert("L"))[..., None]


@pytest.mark.parametrize(("suffix", "data", "kwargs", "expected"), [*kinds()])
def test_every_kind_of_colours_becomes_rgb(tmp_path, suffix, data, kwargs, expected):
    folder_of(tmp_path, data, suffix)
    [image, _] = whole(datasets.load(described(tmp_path, **kwargs), "train", None))
    np.testing.assert_array_equal(image, expected)


def test_a_grey_jpeg_is_its_luma(tmp_path):
    data = encode(natural_images(1, side=40)[0], "JPEG", quality=95)
    folder_of(tmp_path, data, "jpg")
    [image, _] = whole(datasets.load(described(tmp_path, channels=1), "train", None))
    luma = Image.open(io.BytesIO(data))
    luma.draft("L", luma.size)
    np.testing.assert_array_equal(image[..., 0], np.asarray(luma))
    assert described(tmp_path, channels=1, image_size=16).image_shape == (16, 16, 1)
    assert datasets.load(described(tmp_path, channels=1, image_size=16), "train", None).plain(np.arange(2))["image"].std() > 5


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.uint32, np.int16, np.float16])
def test_tiffs_without_a_range_are_refused_by_name(tmp_path, kind):
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, (np.arange(320).reshape(16, 20)).astype(kind))
    folder_of(tmp_path, file.getvalue(), "tiff")
    dataset = described(tmp_path)
    with pytest.raises(DataError, match="none of the 2 images can be decoded"):
        datasets.load(dataset, "train", None) if dataset.whole else datasets.load(dataset, "train", None).augmented(
            np.arange(1), np.zeros(1, np.uint64), Augmentation()
        )


@pytest.mark.parametrize(
    ("bits", "photometric", "data"),
    [
        (12, 1, bytes([0x80, 0x08, 0x00]) * 160),  # 0x800 is grey
        (16, 0, bytes(640)),  # 0 is white
    ],
)
def test_tiffs_of_other_greys_are_refused_by_name(tmp_path, capfd, bits, photometric, data):
    tags = [
        (256, 3, 20), (257, 3, 16), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 3, 16),
        (279, 4, len(data)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    folder_of(tmp_path, head + data + struct.pack("<H", len(tags)) + entries + bytes(4), "tiff")
    with pytest.raises(DataError, match="none of the 2 images can be decoded"):
        datasets.load(described(tmp_path), "train", None)
    said = capfd.readouterr().err
    assert "train/a/1.tiff cannot be decoded (its grey is not of 16 bits with 0 for black; store 8 or 16 bits" in said


def test_a_folder_that_changes_is_seen_when_a_config_is_read_and_not_before(small):
    first = datasets.describe(f"folder:{small}", {})
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(small / "train" / "red" / "new.png")
    assert datasets.describe(f"folder:{small}", {}) == first
    look_again()
    second = datasets.describe(f"folder:{small}", {})
    assert second.sizes["train"] == 21 and second.digest != first.digest
    with pytest.raises(DataError, match="has changed since the config was read"):
        datasets.load(first, "train", None)


def test_a_file_that_is_gone_is_named(photographs, tmp_path):
    dataset = described(photographs, image_size=24)
    train = datasets.load(dataset, "train", None)
    path = photographs / train._examples._paths[0]
    path.rename(tmp_path / "away")
    with pytest.raises(DataError, match=rf"{path} cannot be read \(No such file or directory\)"):
        train.plain(np.arange(2))
    (tmp_path / "away").rename(path)


def test_a_path_is_below_the_data_folder(small):
    look_again()
    assert datasets.describe(f"folder:{small.name}", {}, data_dir=str(small.parent)).sizes == {"train": 20, "test": 2}


def test_labels_are_known_without_reading_an_image(photographs, monkeypatch):
    train = datasets.load(described(photographs, image_size=24), "train", None)
    expected = train.plain(np.arange(len(train)))
    monkeypatch.setattr(type(train._examples), "__getitem__", lambda *_: pytest.fail("an image was read"))
    kept = expected["mask"] > 0
    np.testing.assert_array_equal(train.all_labels()[kept], expected["label"][kept])
