"""Small archives in the layout of ImageNet's, of natural images that two packages ship, and data prepared from them."""

import dataclasses
import io
import pathlib
import subprocess
import tarfile
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from skimage.data import astronaut, chelsea, coffee, rocket
from sklearn.datasets import load_sample_images

from tests.running import ROOT

WORDNET_IDS = ("n01440764", "n01443537", "n01484850", "n01491361")


def natural_images(count: int, *, side: int, seed: int = 0) -> list[Image.Image]:
    """Windows of random place and shape out of six photographs, scaled so that the longer side is about `side`."""
    photographs = [*load_sample_images().images, *(image() for image in (astronaut, chelsea, coffee, rocket))]
    draw = np.random.default_rng(seed)
    images = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        height, width = (int(size * draw.uniform(0.6, 1.0)) for size in photograph.shape[:2])
        top, left = (
            int(draw.integers(0, size - part + 1)) for size, part in zip(photograph.shape, (height, width), strict=False)
        )
        window = Image.fromarray(photograph[top : top + height, left : left + width])
        scale = side / max(height, width)
        images.append(window.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS))
    return images


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_archives(
    folder: pathlib.Path, train: list[bytes], validation: list[bytes], *, truncate: tuple[str, ...] = ()
) -> dict[str, bytes]:
    """Writes ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; returns the files in them by name.

    Args:
      train: images, dealt out to the classes of `WORDNET_IDS` in turn.
      validation: images; the builder knows their classes.
      truncate: the names of files that end in the middle.
    """
    of_classes = {
        wordnet_id: {f"{wordnet_id}_{j}.JPEG": data for j, data in enumerate(train[i :: len(WORDNET_IDS)])}
        for i, wordnet_id in enumerate(WORDNET_IDS)
    }
    of_validation = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": data for i, data in enumerate(validation)}
    for files in (*of_classes.values(), of_validation):
        files.update({name: data[: len(data) // 2] for name, data in files.items() if name in truncate})
    folder.mkdir(parents=True, exist_ok=True)
    archives = {f"{wordnet_id}.tar": _tar(files) for wordnet_id, files in of_classes.items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(archives))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar(of_validation))
    return {name: data for files in (*of_classes.values(), of_validation) for name, data in files.items()}


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclasses.dataclass(frozen=True)
class SmallImageNet:
    """ImageNet in small, as `scripts/prepare_imagenet.sh` leaves it behind; one image of each split is cut short.

    Attributes:
      data_dir: TFDS's data folder.
      train, validation: how many images there are.
      images: the files by name.
      truncated: which ones end in the middle, by split.
    """

    data_dir: pathlib.Path
    train: int
    validation: int
    images: dict[str, bytes]
    truncated: dict[str, str]

    @property
    def kwargs(self) -> dict[str, int]:
        """The `dataset.kwargs` that state its sizes."""
        return {"train_size": self.train, "validation_size": self.validation}


def prepare_small(folder: pathlib.Path, *, train: int = 64, validation: int = 24, side: int = 160) -> SmallImageNet:
    """Runs the script on small archives."""
    truncated = {"train": "n01443537_3.JPEG", "validation": "ILSVRC2012_val_00000005.JPEG"}
    images = [jpeg(image) for image in natural_images(train + validation, side=side)]
    files = write_archives(folder / "archives", images[:train], images[train:], truncate=tuple(truncated.values()))
    command = [ROOT / "scripts" / "prepare_imagenet.sh", folder / "archives", folder / "data"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SmallImageNet(folder / "data", train, validation, files, truncated)


def names(small: SmallImageNet, split: str) -> list[str]:
    """The files in the order in which they are stored, by TFDS's own reading."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder("imagenet2012", data_dir=str(small.data_dir), file_format="array_record")
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [example["file_name"].decode() for example in source]


def prepare_small_v2(data_dir: pathlib.Path, folder: pathlib.Path, images: dict[int, bytes]) -> None:
    """Prepares ImageNet-v2 of one image for each of some classes by its own builder, but for the download."""
    import tensorflow_datasets as tfds

    builder = tfds.builder("imagenet_v2/matched-frequency", data_dir=str(data_dir), file_format="array_record")
    for label, data in images.items():
        file = folder / "imagenetv2-matched-frequency-format-val" / str(label) / "image.jpeg"
        file.parent.mkdir(parents=True)
        file.write_bytes(data)
    with mock.patch.object(tfds.download.DownloadManager, "download_and_extract", return_value=str(folder)):
        builder.download_and_prepare()
