"""The likeliest classes of image files."""

import csv
import dataclasses
import io
import json
import os
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, softmax
from skimage.data import chelsea

import lowrank_jax.experiment as lx
from lowrank_jax.experiment.data import datasets, image_files
from lowrank_jax.experiment.data.base import Decoding, Field
from lowrank_jax.experiment.evaluation import predictions
from lowrank_jax.experiment.evaluation.predictions import Prediction
from lowrank_jax.experiment.evaluation.results import as_json
from lowrank_jax.experiment.training.loop import train
from tests import running

DIGITS = datasets.describe("digits", {})


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions") / "run"
    train(running.config(steps=20, model__kwargs={"widths": (16,)}, lowrank__method="none", dataset__mixup=0.0), str(folder))
    return lx.restore(folder)


@pytest.fixture(scope="module")
def images():
    return datasets.load(DIGITS, "test", None).plain(np.arange(30))["image"]


def save(image, path):
    Image.fromarray(np.squeeze(image)).save(path)
    return str(path)


def test_an_image_of_the_data_set_in_a_file_is_what_it_is_in_memory(net, images, tmp_path):
    paths = [save(image, tmp_path / f"{i:02}.{'png' if i % 2 else 'bmp'}") for i, image in enumerate(images)]
    done = net.predict(paths)
    assert [prediction.file for prediction in done] == paths
    shares = softmax(net(images).astype(np.float64), axis=-1)
    for prediction, expected in zip(done, shares, strict=True):
        assert list(prediction.labels) == np.argsort(-expected)[:5].tolist()
        assert prediction.names == tuple(map(str, prediction.labels))
        assert prediction.probabilities == pytest.approx(np.sort(expected)[::-1][:5], rel=1e-5)
        assert (prediction.changed, prediction.error) == ("", "")
    [one] = net.predict(tmp_path / "03.png", top=20)
    assert len(one.labels) == 10 and sum(one.probabilities) == pytest.approx(1)


@pytest.mark.parametrize("top", [0, -1, True, 1.0, None])
def test_a_number_of_classes_that_is_none_is_refused(net, top):
    with pytest.raises(lx.UserError, match=rf"^top={top}; give a whole number of at least 1$"):
        net.predict("nowhere.png", top=top)


def test_more_files_than_a_batch_keep_their_order(net, images, tmp_path):
    paths = [save(images[i % 30], tmp_path / f"{i}.png") for i in range(3 * net.batch_size // 2)]
    done = net.predict(paths)
    labels = net(images).argmax(-1)
    assert [prediction.labels[0] for prediction in done] == [labels[i % 30] for i in range(len(paths))]


def test_a_folder_stands_for_the_images_in_it_and_below(net, images, tmp_path):
    for name in ("b.png", "a.JPG", "below/c.webp", ".hidden/d.png", "below/.e.png", "notes.txt", "below/g.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("")
        else:
            save(images[0], tmp_path / name)
    found, others = image_files.find([tmp_path, tmp_path / "notes.txt"])
    assert [os.path.relpath(file, tmp_path) for file in found] == ["a.JPG", "b.png", "below/c.webp", "below/g.PNG", "notes.txt"]
    assert others == 2  # below/.e.png and notes.txt
    assert [prediction.file for prediction in net.predict(tmp_path)] == found[:4]


def test_what_cannot_be_read_is_named_and_the_others_are_predicted(net, images, tmp_path):
    good = save(images[0], tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    bad = [str(tmp_path / name) for name in ("cut.png", "none.png", "empty.png", "pipe.png", "nowhere.png")]
    done = net.predict([bad[0], good, *bad[1:]])
    assert [prediction.file for prediction in done if not prediction.error] == [good]
    assert [prediction.error for prediction in done if prediction.error][1:] == [
        "not an image, or of another format than BMP, GIF, JPEG, PNG, TIFF, WEBP",
        "not an image, or of another format than BMP, GIF, JPEG, PNG, TIFF, WEBP",
        "it is not a plain file",
        "No such file or directory",
    ]
    assert "truncated" in done[0].error and not done[0].labels
    assert all(prediction.error for prediction in net.predict(bad))  # without any to predict


def test_there_must_be_files(net, tmp_path):
    for nothing in (tmp_path, []):
        with pytest.raises(lx.UserError, match="there are no image files"):
            net.predict(nothing)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **options)
    return file.getvalue()


def test_other_sizes_and_colours_become_those_of_the_data_set_and_that_is_said():
    cat = chelsea()  # 300 x 451
    image, changed = image_files.read(DIGITS, encoded(cat))
    assert (image.shape, image.dtype) == ((8, 8, 1), np.uint8)
    assert changed == "resized from 451x300 to 8x8 and turned grey"
    square = Image.fromarray(cat[:, 75:375]).convert("L").resize((8, 8), Image.Resampling.BOX)
    assert np.abs(image[..., 0].astype(int) - np.asarray(square)).mean() < 2
    wide = dataclasses.replace(DIGITS, image_shape=(16, 48, 3))
    image, changed = image_files.read(wide, encoded(cat))
    assert changed == "resized from 451x300 to 48x16"
    part = Image.fromarray(cat[75:225]).resize((48, 16), Image.Resampling.BOX)
    assert np.abs(image.astype(int) - np.asarray(part)).mean() < 2


@pytest.mark.parametrize("grey", [0, 1, 77, 128, 254, 255])
def test_a_grey_image_stays_as_it_is(grey):
    pixels = np.full((8, 8), grey, np.uint8)
    image, changed = image_files.read(DIGITS, encoded(pixels))
    assert (image[..., 0] == pixels).all() and changed == ""


def test_images_of_many_sizes_are_cropped_as_in_evaluation(small_imagenet):
    """The pixels are those that an evaluation reads out of the prepared data."""
    dataset = datasets.describe("imagenet2012", small_imagenet.kwargs, image_size=48, decoding=Decoding(0.7))
    split = datasets.load(dataset, "train", str(small_imagenet.data_dir))
    batch = split.plain(np.arange(len(split)))
    evaluated = {image.tobytes() for image, mask in zip(batch["image"], batch["mask"], strict=True) if mask}
    files = {name: data for name, data in small_imagenet.images.items() if name.startswith("n")}
    del files[small_imagenet.truncated["train"]]
    read = {name: image_files.read(dataset, data) for name, data in files.items()}
    assert {image.tobytes() for image, _ in read.values()} == evaluated
    assert not any(changed for _, changed in read.values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_shape": (64,)}, r"its inputs are \[64\], which no image file holds"),
        ({"image_shape": (8, 8, 5)}, r"its inputs are \[8, 8, 5\], which no image file holds"),
        ({"image_dtype": "float32"}, "its inputs are float32, and image files hold whole numbers"),
        ({"num_classes": None}, "digits: the label of an example is not one class"),
        ({"label": Field((8, 8), "int32")}, "digits: the label of an example is not one class"),
    ],
)
def test_networks_of_other_kinds_are_refused_by_name(net, tmp_path, changes, reason):
    other = dataclasses.replace(net, dataset=dataclasses.replace(net.dataset, **changes))
    with pytest.raises(lx.UserError, match=reason):
        other.predict(tmp_path / "image.png")


def with_objective(net, name):
    return dataclasses.replace(net, config=SimpleNamespace(objective=SimpleNamespace(name=name), eval=net.config.eval))


def test_probabilities_are_those_of_the_objective(net, images, tmp_path):
    path = save(images[0], tmp_path / "image.png")
    [found] = with_objective(net, "sigmoid").predict(path, top=10)
    logits = net(images[:1])[0].astype(np.float64)
    assert found.probabilities == pytest.approx([expit(logits[label]) for label in found.labels], rel=1e-5)
    assert found.labels == net.predict(path, top=10)[0].labels and sum(found.probabilities) != pytest.approx(1, rel=1e-3)
    for other in ("mse", "package.module:function"):
        with pytest.raises(lx.UserError, match=f"digits: objective.name={other} need not choose one class"):
            with_objective(net, other).predict(path)


def test_outputs_that_are_no_numbers_are_an_error_of_the_image(net, images, tmp_path):
    broken = dataclasses.replace(net, _forward=lambda variables, images: np.full((len(images), 10), np.nan))
    [found] = broken.predict(save(images[0], tmp_path / "image.png"))
    assert found.error == "the network's outputs for it are not finite" and not found.labels


@pytest.mark.parametrize("sides", [(24, 24), (24, 31)])
def test_the_images_of_a_folder_are_predicted_as_they_are_evaluated(tmp_path, sides):
    """Those of one small size are kept in memory, whole, and others cropped; both are turned as their EXIF data say."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = draw.integers(0, 100, (sides[i % 2], 24, 3)) + np.eye(3, dtype=int)[label] * 100
                exif = Image.Exif()
                exif[0x0112] = 3 if i % 3 else 1
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png", exif=exif)
    size = {} if sides[0] == sides[1] else {"dataset__image_size": 16}
    config = running.config(
        steps=10, dataset__name=f"folder:{tmp_path / 'images'}", dataset__mixup=0.0, dataset__crop_padding=0,
        model__kwargs={"widths": (8,)}, lowrank__method="none", **size,
    )  # fmt: skip
    train(config, str(tmp_path / "run"))
    found = lx.evaluate(tmp_path / "run").classes
    done = lx.restore(tmp_path / "run").predict(tmp_path / "images" / "test")
    assert found.names == ("ant", "bee", "cat") and not any(prediction.changed or prediction.error for prediction in done)
    pairs = [(found.names.index(pathlib.Path(one.file).parent.name), one.labels[0]) for one in done]
    expected = np.zeros((3, 3), int)
    np.add.at(expected, tuple(np.transpose(pairs)), 1)
    np.testing.assert_array_equal(found.confusion, expected)


HOSTILE = Prediction("=cmd()\x1b[2J.png", (1, 0), ("+a", "b,c"), (0.75, 0.25))


def test_a_table_is_safe_to_open():
    text = predictions.table([HOSTILE, Prediction("bad.png", error="not an image")], 3)
    header, first, second = csv.reader(io.StringIO(text))
    assert header == ["file", "class1", "probability1", "class2", "probability2", "class3", "probability3", "error"]
    assert first == ["'=cmd()\\x1b[2J.png", "'+a", "0.75", "b,c", "0.25", "", "", ""]
    assert second == ["bad.png", "", "", "", "", "", "", "not an image"]


def test_a_line_is_safe_to_print_and_json_holds_what_is_there():
    assert HOSTILE.line(5) == "=cmd()\\x1b[2J.png  +a 0.7500  b,c 0.2500"
    assert json.loads(as_json([HOSTILE.record()])) == [
        {
            "file": HOSTILE.file,
            "classes": [{"label": 1, "class": "+a", "probability": 0.75}, {"label": 0, "class": "b,c", "probability": 0.25}],
            "changed": "",
            "error": "",
        }
    ]
