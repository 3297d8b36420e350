"""What a function says of its data besides the examples."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from lowrank_jax.experiment.data.base import DataError, Decoding
from lowrank_jax.experiment.data.own import Data, Items, with_facts


def test_what_is_said_becomes_plain_values():
    facts: dict[str, Any] = {"mean": np.array([0.5]), "std": np.float32([0.25]), "num_classes": np.int64(3)}
    data = with_facts(Data({}, class_names=np.array(["a", "b", "c"]), **facts), "x")
    assert (data.mean, data.std, data.num_classes, data.class_names) == ((0.5,), (0.25,), 3, ("a", "b", "c"))
    assert type(data.num_classes) is int and all(type(value) is float for value in (*data.mean, *data.std))
    assert with_facts(Data({}), "x") == Data({})


@pytest.mark.parametrize("facts", [{"mean": 0.5}, {"std": None}, {"class_names": "ab"}, {"class_names": None}, {"channels": 4}])
def test_what_cannot_be_meant_is_refused(facts: dict[str, Any]):
    with pytest.raises(DataError, match=rf"^x: its {next(iter(facts))} .*; give "):
        with_facts(Data({}, **facts), "x")


@pytest.mark.parametrize("number", range(1, 9))
def test_pillows_images_are_turned_as_their_files_would_be(number):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", exif=exif)
    image = Image.open(file)
    turned = ImageOps.exif_transpose(image)
    for given in (image, image.convert("RGB"), turned):
        read = Items([(given, 0)], "x", 3, Decoding(exif=True)).read(0).image
        np.testing.assert_array_equal(read, np.asarray(turned))
    stored = Items([(image, 0)], "x", 3, Decoding(exif=False)).read(0).image
    np.testing.assert_array_equal(stored, values)
