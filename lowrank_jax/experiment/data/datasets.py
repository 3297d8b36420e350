"""The data sets that a config can name: a name, what is known about the data set, and the source that reads it.

A data set of a known kind is an entry of `DATASETS`; a new kind of source is a module in `sources`.  The user's own data has a
prefix that says how it is stored, or is code, "package.module:attribute".
"""

import contextlib
import contextvars
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_jax.experiment.data import sources
from lowrank_jax.experiment.data.base import DataError, Dataset, Decoding, Request, Source, Split, positive
from lowrank_jax.experiment.data.sources import synthetic, tfds_arrays, tfds_records
from lowrank_jax.text import did_you_mean

__all__ = [
    "DATASETS",
    "NAMES",
    "DataError",
    "Dataset",
    "Decoding",
    "Split",
    "describe",
    "find",
    "is_code",
    "is_recorded",
    "load",
    "problem",
]


@dataclasses.dataclass(frozen=True)
class ImageNetOptions:
    """The legal `dataset.kwargs` of `imagenet2012`: its sizes, if only a part of it was prepared on purpose."""

    train_size: int = positive(1_281_167)
    validation_size: int = positive(50_000)


_IMAGENET = Dataset(
    "imagenet2012", (224, 224, 3), 1000, {}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
    prepare="scripts/prepare_imagenet.sh MANUAL_DIR DATA_DIR", decoding=Decoding(), partial=True,
)  # fmt: skip


def _imagenet(options: ImageNetOptions) -> Dataset:
    return dataclasses.replace(_IMAGENET, sizes={"train": options.train_size, "validation": options.validation_size})


_DIGITS = Dataset("digits", (8, 8, 1), 10, {"train": 1437, "test": 360}, (0.305,), (0.377,), class_names=tuple("0123456789"))

_FASHION_MNIST = Dataset(
    "fashion_mnist", (28, 28, 1), 10, {"train": 60_000, "test": 10_000}, (0.2860,), (0.3530,),
    prepare="scripts/prepare_fashion_mnist.sh DATA_DIR",
    class_names=("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
)  # fmt: skip

_CIFAR10 = Dataset(
    "cifar10", (32, 32, 3), 10, {"train": 50_000, "test": 10_000}, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    prepare="tfds build cifar10 --file_format=array_record --data_dir=DATA_DIR",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)  # fmt: skip

_IMAGENET_V2 = dataclasses.replace(
    _IMAGENET, name="imagenet_v2", sizes={"test": 10_000}, partial=False,
    prepare="tfds build imagenet_v2/matched-frequency --file_format=array_record --data_dir=DATA_DIR",
)  # fmt: skip

DATASETS: dict[str, Source] = {
    "digits": tfds_arrays.source(_DIGITS),
    "fashion_mnist": tfds_arrays.source(_FASHION_MNIST),
    "cifar10": tfds_arrays.source(_CIFAR10),
    "imagenet2012": tfds_records.source(_IMAGENET, ImageNetOptions, _imagenet),
    "imagenet_v2": tfds_records.source(_IMAGENET_V2),
    "synthetic": synthetic.SOURCE,
}

NAMES = (*DATASETS,)


_PREFIXES = {
    "folder": ("folder", "a folder of images: folder:PATH"),
    "tfds": ("tfds_builder", "a data set of TFDS: tfds:NAME, or tfds:NAME/CONFIG"),
    "arrays": ("arrays_file", "a file of NumPy arrays: arrays:FILE.npz"),
}
"""The user's own data by the prefix of its name: the module in `sources`, imported when it is needed, and how it is named."""


def is_code(name: str) -> bool:
    """Whether a name is of the user's own code, which would be imported."""
    return ":" in name and name.partition(":")[0] not in _PREFIXES


def find(name: str) -> Source:
    """The source of a data set; here and in `problem` alone a name becomes a source.

    Raises:
      ValueError: there is no such data set; the message proposes a name.
    """
    if complaint := problem(name):
        raise ValueError(f"{complaint.replace('unknown', f'unknown {name!r}', 1)}")
    if name in DATASETS:
        return DATASETS[name]
    prefix, _, rest = name.partition(":")
    module, argument = (_PREFIXES[prefix][0], rest) if prefix in _PREFIXES else ("code", name)
    return importlib.import_module(f"{sources.__name__}.{module}").source(argument, name)


def problem(name: str) -> str | None:
    """What is wrong with a name; None if `find` knows it.  Code is not imported for that."""
    prefix, colon, rest = name.partition(":")
    if not colon:
        return None if name in DATASETS else f"unknown{did_you_mean(name, NAMES)}"
    if prefix in _PREFIXES:
        return None if rest.strip() else f"unknown; {_PREFIXES[prefix][1]}"
    return None


def describe(
    name: str,
    options: Mapping[str, Any],
    *,
    image_size: int | None = None,
    decoding: Decoding | None = None,
    data_dir: str | None = None,
    code_dir: str | None = None,
) -> Dataset:
    """What is known about a data set; the user's own data is looked at, but within `recorded`.

    Args:
      options: its `dataset.kwargs`, already checked.
      image_size, decoding: how to read images of many sizes; None for the data set's own.  Ignored if all have one size.
      data_dir, code_dir: see `Request`.

    Raises:
      DataError: it is the user's own, and cannot be used.
    """
    known = _known(name)
    if known is not None:
        dataset = dataclasses.replace(known, origin=_RECORD)
    else:
        source = find(name)
        given = options if source.free_options else source.options(**options) if source.options else None
        dataset = source.describe(given, Request(data_dir, code_dir, image_size))
    if dataset.decoding is None:
        return dataset
    if decoding:
        limits = {"eval_crop": decoding.eval_crop, "max_undecodable": decoding.max_undecodable}
        dataset = dataclasses.replace(dataset, decoding=dataclasses.replace(dataset.decoding, **limits))
    if dataset.whole:
        return dataset
    height, width, channels = dataset.image_shape
    return dataclasses.replace(dataset, image_shape=(image_size or height, image_size or width, channels))


_RECORD = "the record of a run"
"""The origin of data that was not looked at."""
_recorded: contextvars.ContextVar[Dataset | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def recorded(dataset: Dataset | None) -> Iterator[None]:
    """Within, the user's own data of this name is described as it is here, whatever it is now; it cannot be read.

    Args:
      dataset: as a run recorded it; None or published data changes nothing.
    """
    token = _recorded.set(dataset)
    try:
        yield
    finally:
        _recorded.reset(token)


def is_recorded(name: str) -> bool:
    """Whether a data set is known by a record: it is not looked at, and no code of it is imported."""
    return _known(name) is not None


def _known(name: str) -> Dataset | None:
    known = _recorded.get()
    return known if known is not None and known.digest and known.name == name else None


def load(dataset: Dataset, split: str, data_dir: str | None) -> Split:
    """A split, such as "train[:90%]": read into memory, or opened if its images are encoded and have many sizes.

    Raises:
      DataError: the data set is not prepared, damaged, or of other sizes or classes than expected.
      ValueError: there is no such split.
    """
    if dataset.origin == _RECORD:
        raise DataError(f"{dataset.name} is known by {_RECORD} alone; read its config again to look at the data")
    return find(dataset.name).load(dataset, split, data_dir)
