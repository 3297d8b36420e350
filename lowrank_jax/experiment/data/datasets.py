"""The data sets that a config can name: what is known of them without touching data, and how their splits are opened."""

import contextlib
import dataclasses
import io
import shlex
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from lowrank_jax.experiment.data import stored
from lowrank_jax.experiment.data.augment import Augmentation, augment
from lowrank_jax.experiment.data.base import Batch, DataError, Dataset, Decoding, Split
from lowrank_jax.experiment.data.splits import split_parts


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split in memory: `images` uint8 `[size, height, width, channels]`, `labels` int32 `[size]`."""

    images: np.ndarray
    labels: np.ndarray

    # To gather a batch from memory takes less time than to hand it from one thread to another.
    prefetch = 0

    @property
    def undecodable(self) -> dict[int, str]:
        return {}

    def __len__(self) -> int:
        return len(self.labels)

    def augmented(self, index: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> Batch:
        return {"image": augment(self.images[index], bits, augmentation), "label": self.labels[index]}

    def plain(self, index: np.ndarray) -> Batch:
        mask = np.ones(len(index), np.float32)
        return {"image": self.images[index], "label": self.labels[index], "mask": mask}


def _positive(default: Any) -> Any:
    """A field whose value, or every one of its values, must be at least 1."""

    def check(value: Any) -> str | None:
        return None if min(value if isinstance(value, tuple) else (value,)) >= 1 else "must be at least 1"

    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """The legal `dataset.kwargs` of the data set `synthetic`."""

    image_shape: tuple[int, int, int] = _positive((32, 32, 3))
    num_classes: int = _positive(10)
    train_size: int = _positive(4096)
    test_size: int = _positive(1024)


@dataclasses.dataclass(frozen=True)
class ImageNetOptions:
    """The legal `dataset.kwargs` of `imagenet2012`: the sizes, where only a part of it was prepared on purpose."""

    train_size: int = _positive(1_281_167)
    validation_size: int = _positive(50_000)


OPTIONS = {"synthetic": SyntheticOptions, "imagenet2012": ImageNetOptions}
"""The legal `dataset.kwargs` by data set; the others take none."""

_IMAGENET: dict[str, Any] = {
    "image_shape": (224, 224, 3),
    "num_classes": 1000,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "decoding": Decoding(),
    "classes": "imagenet2012",
}

_TFDS = {
    dataset.name: dataset
    for dataset in (
        Dataset("digits", (8, 8, 1), 10, {"train": 1437, "test": 360}, (0.305,), (0.377,)),
        Dataset(
            "fashion_mnist", (28, 28, 1), 10, {"train": 60_000, "test": 10_000}, (0.2860,), (0.3530,),
            prepare="scripts/prepare_fashion_mnist.sh DATA_DIR",
        ),
        Dataset(
            "cifar10", (32, 32, 3), 10, {"train": 50_000, "test": 10_000}, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
            prepare="tfds build cifar10 --file_format=array_record --data_dir=DATA_DIR",
        ),
        Dataset(
            "imagenet2012", sizes={"train": 1_281_167, "validation": 50_000},
            prepare="scripts/prepare_imagenet.sh MANUAL_DIR DATA_DIR", **_IMAGENET,
        ),
        Dataset(
            "imagenet_v2", sizes={"test": 10_000},
            prepare="tfds build imagenet_v2/matched-frequency --file_format=array_record --data_dir=DATA_DIR", **_IMAGENET,
        ),
    )
}  # fmt: skip

NAMES = (*_TFDS, "synthetic")


def describe(name: str, options: dict[str, Any], *, image_size: int | None = None, decoding: Decoding | None = None) -> Dataset:
    """The data set of that name.

    Args:
      options: its `dataset.kwargs`, already checked.
      image_size, decoding: how to read it where its images have many sizes; None for its own.
    """
    if name == "synthetic":
        return _describe_synthetic(SyntheticOptions(**options))
    dataset = _TFDS[name]
    if name == "imagenet2012":
        subset = ImageNetOptions(**options)
        sizes = {"train": subset.train_size, "validation": subset.validation_size}
        dataset = dataclasses.replace(dataset, sizes=sizes)
    if dataset.decoding is None:
        return dataset
    height, width, channels = dataset.image_shape
    shape = (image_size or height, image_size or width, channels)
    return dataclasses.replace(dataset, image_shape=shape, decoding=decoding or dataset.decoding)


def _describe_synthetic(options: SyntheticOptions) -> Dataset:
    height, width, channels = options.image_shape
    sizes = {"train": options.train_size, "test": options.test_size}
    mean, std = (0.5,) * channels, (0.25,) * channels
    return Dataset("synthetic", (height, width, channels), options.num_classes, sizes, mean, std)


def load(dataset: Dataset, split: str, data_dir: str | None) -> Split:
    """Reads a whole split into memory; where its images have many sizes, only makes sure that it is there.

    Raises:
      DataError: the data set is not prepared, or not the registered one.
    """
    if dataset.decoding:
        return _open_records(dataset, split, data_dir)
    read = _synthesize if dataset.name == "synthetic" else _read_tfds
    parts = []
    for name, start, stop in split_parts(dataset, split):
        whole = read(dataset, name, data_dir)
        parts.append(Arrays(whole.images[start:stop], whole.labels[start:stop]))
    if len(parts) == 1:
        return parts[0]
    return Arrays(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))


def _open_records(dataset: Dataset, split: str, data_dir: str | None) -> Split:
    import tensorflow_datasets as tfds

    from lowrank_jax.experiment.data.records import Records

    parts = split_parts(dataset, split)
    builder = _prepared(dataset, data_dir)
    for name in {name for name, *_ in parts}:
        _check_split(dataset, name, builder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    sources: Any = {name: builder.as_data_source(name, deserialize_method=raw) for name, *_ in parts}  # type: ignore[call-arg]
    stored_parts = [(sources[name].data_source, start, stop) for name, start, stop in parts]
    return Records(dataset, split, stored_parts, _remedy(dataset, builder.data_path, _root(builder)))


def _check_split(dataset: Dataset, split: str, builder: Any) -> None:
    """Raises DataError unless the stored split is all there and what is registered."""
    expected, splits = dataset.sizes[split], builder.info.splits
    remedy = _remedy(dataset, builder.data_path, _root(builder))
    there = splits[split].num_examples if split in splits else 0
    if there != expected:
        subset = (
            f'; if the subset is meant, set dataset.kwargs to {{"{split}_size": {there}}}' if dataset.name in OPTIONS else ""
        )
        raise DataError(
            f"{dataset.name}/{split} under {_root(builder)} has {there:,} examples, {expected:,} expected; {remedy}"
            f"{subset if there else ''}"
        )
    with _explained(remedy):
        stored.shards(builder, split)
    classes = builder.info.features["label"].num_classes
    if classes != dataset.num_classes:
        raise DataError(f"{builder.data_path} has {classes} classes, {dataset.num_classes} expected; {remedy}")


def _read_tfds(dataset: Dataset, split: str, data_dir: str | None) -> Arrays:
    builder = _prepared(dataset, data_dir)
    cache = builder.data_path / f"decoded-{split}.npz"
    decoded = _read_cache(cache)
    if decoded is None or len(decoded) != dataset.sizes[split]:
        _check_split(dataset, split, builder)
        with _explained(_remedy(dataset, builder.data_path, _root(builder))):
            stored.check_all(builder)
        source: Any = builder.as_data_source(split)  # type: ignore[call-arg]
        examples = source.__getitems__(range(len(source)))
        decoded = Arrays(
            np.stack([example["image"] for example in examples]),
            np.array([example["label"] for example in examples], np.int32),
        )
        _write_cache(cache, decoded)
    return decoded


def _read_cache(path: epath.Path) -> Arrays | None:
    """Decoding 60,000 PNGs takes longer than many a run; the next one finds the pixels beside the records."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return Arrays(arrays["images"], arrays["labels"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write_cache(path: epath.Path, arrays: Arrays) -> None:
    """A courtesy to the next run: where the folder is read-only there is just no cache."""
    import uuid

    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            np.savez(file, images=arrays.images, labels=arrays.labels)
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)


def _prepared(dataset: Dataset, data_dir: str | None):
    """The TFDS builder, its data on disk as array_record."""
    import tensorflow_datasets as tfds

    if dataset.name == "digits":
        from lowrank_jax.experiment.data.digits.digits_dataset_builder import Builder

        builder = Builder(data_dir=data_dir, file_format="array_record")
        # It ships with scikit-learn, so nothing is fetched, whatever TFDS says on the way.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        return builder
    root, path = stored.folder(dataset.name, data_dir)
    try:
        with _explained(_remedy(dataset, path, root)):
            builder = stored.open_builder(dataset.name, data_dir, path)
    except stored.OtherFormat:
        where = f" under {data_dir}" if data_dir else ""
        raise DataError(
            f"{dataset.name} is prepared{where}, but not as array_record; prepare it in another folder: {dataset.prepare}"
        ) from None
    if not builder.is_prepared():
        raise DataError(f"{dataset.name} is not prepared under {_root(builder)}; run: {_command(dataset, _root(builder))}")
    return builder


def _root(builder: Any) -> str:
    """TFDS's data folder."""
    return str(builder.data_dir_root)


def _command(dataset: Dataset, root: str) -> str:
    """What prepares a data set in the folder where it is looked for; one that needs nothing is made on first use."""
    return dataset.prepare.replace("DATA_DIR", shlex.quote(root)) or "the same command"


def _remedy(dataset: Dataset, path: epath.Path, root: str) -> str:
    """What to do about damaged data: TFDS would reuse a folder that is there."""
    return f"delete {shlex.quote(str(path))}, then: {_command(dataset, root)}"


@contextlib.contextmanager
def _explained(remedy: str) -> Iterator[None]:
    """Turns what may be wrong with stored data into a DataError that says what to do."""
    try:
        yield
    except stored.Damaged as error:
        raise DataError(f"{error}; {remedy}") from None
    except PermissionError as error:
        raise DataError(f"{error.filename}: {error.strerror}; let this user read it") from None


def _synthesize(dataset: Dataset, split: str, data_dir: str | None) -> Arrays:
    """Images that a small network can learn: a fixed random pattern per class, and noise."""
    del data_dir
    patterns = np.random.default_rng(0).integers(0, 256, (dataset.num_classes, *dataset.image_shape))
    draw = np.random.default_rng([1, split == "train"])
    labels = draw.integers(0, dataset.num_classes, dataset.sizes[split]).astype(np.int32)
    noise = draw.integers(0, 256, (len(labels), *dataset.image_shape))
    return Arrays(((patterns[labels] + noise) // 2).astype(np.uint8), labels)
