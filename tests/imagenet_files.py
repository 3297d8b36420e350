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


_TRUNCATED = {"train": "n01443537_3.JPEG", "validation": "ILSVRC2012_val_00000005.JPEG"}


def write_small(folder: pathlib.Path, *, train: int = 64, validation: int = 24, side: int = 160) -> SmallImageNet:
    """Writes the files that TFDS's builder would leave behind, without the builder, which takes much longer."""
    files = _small_files(folder / "archives", train, validation, side)
    shuffled = np.random.default_rng(0).permutation(list(files)).tolist()
    records = {
        split: [example(files[name], _label(name), name) for name in shuffled if name.startswith(prefix)]
        for split, prefix in (("train", "n"), ("validation", "ILSVRC2012_val"))
    }
    write_prepared("imagenet2012", folder / "data", records)
    return SmallImageNet(folder / "data", train, validation, files, _TRUNCATED)


def prepare_small(folder: pathlib.Path, *, train: int = 64, validation: int = 24, side: int = 160) -> SmallImageNet:
    """Runs the script, and with it TFDS's builder, on small archives."""
    files = _small_files(folder / "archives", train, validation, side)
    command = [ROOT / "scripts" / "prepare_imagenet.sh", folder / "archives", folder / "data"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SmallImageNet(folder / "data", train, validation, files, _TRUNCATED)


def _small_files(archives: pathlib.Path, train: int, validation: int, side: int) -> dict[str, bytes]:
    images = [jpeg(image) for image in natural_images(train + validation, side=side)]
    return write_archives(archives, images[:train], images[train:], truncate=tuple(_TRUNCATED.values()))


def _label(name: str) -> int:
    """The class of a training image; TFDS's builder has a list of those of the validation images."""
    return WORDNET_IDS.index(name.split("_")[0]) if name.startswith("n") else int(name[-10:-5]) % 1000


def example(image: bytes, label: int, name: str) -> bytes:
    """A TensorFlow Example as TFDS stores it."""
    from tensorflow_datasets.proto import tf_example_pb2

    stored = tf_example_pb2.Example()  # type: ignore[attr-defined]
    features = stored.features.feature
    features["image"].bytes_list.value.append(image)
    features["label"].int64_list.value.append(label)
    features["file_name"].bytes_list.value.append(name.encode())
    return stored.SerializeToString()


def write_prepared(name: str, data_dir: pathlib.Path, records: dict[str, list[bytes]]) -> None:
    """Writes a data set of TFDS's as its builder would store it, as array_record in one file a split."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module  # type: ignore[attr-defined]

    builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    folder = pathlib.Path(builder.data_path)
    folder.mkdir(parents=True)
    splits = []
    for split, stored in records.items():
        files = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=builder.name, split=split, filetype_suffix="array_record"
        )
        writer = array_record_module.ArrayRecordWriter(str(files.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        for record in stored:
            writer.write(record)
        writer.close()
        size = sum(map(len, stored))
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=[len(stored)], num_bytes=size, filename_template=files))
    builder.info.set_splits(tfds.core.SplitDict(splits))
    builder.info.write_to_directory(folder)


def stored_records(small: SmallImageNet, split: str) -> list[bytes]:
    """The records of a split in their order, by TFDS's own reading."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder("imagenet2012", data_dir=str(small.data_dir), file_format="array_record")
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return list(source.data_source)


def names(small: SmallImageNet, split: str) -> list[str]:
    """The files in the order in which they are stored."""
    from tensorflow_datasets.proto import tf_example_pb2

    parse = tf_example_pb2.Example.FromString  # type: ignore[attr-defined]
    records = (parse(record).features.feature for record in stored_records(small, split))
    return [record["file_name"].bytes_list.value[0].decode() for record in records]


def write_small_v2(data_dir: pathlib.Path, images: dict[int, bytes]) -> None:
    """Writes ImageNet-v2 of one image for each of some classes."""
    records = [example(data, label, f"{label}.jpeg") for label, data in images.items()]
    write_prepared("imagenet_v2/matched-frequency", data_dir, {"test": records})


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
