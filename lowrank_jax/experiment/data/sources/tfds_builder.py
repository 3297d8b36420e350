"""`tfds:NAME` or `tfds:NAME/CONFIG`: any data set of TFDS with an image and a label; and builders of the user's own."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lowrank_jax.experiment.data.arrays import read_split
from lowrank_jax.experiment.data.base import DataError, Dataset, Decoding, Field, Request, Source, Split
from lowrank_jax.experiment.data.kept import Kept
from lowrank_jax.experiment.data.own import digest_of
from lowrank_jax.experiment.data.progress import to_stderr
from lowrank_jax.experiment.data.sources import tfds_arrays, tfds_folder, tfds_records
from lowrank_jax.experiment.data.sources.folder import DEFAULT_SIZE, SMALL_SIDE, SMALL_TOTAL, classes_of
from lowrank_jax.experiment.data.sources.tfds_prepared import Keys, Prepared, explained
from lowrank_jax.text import did_you_mean, first_line


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where the data is, by which builder: its name, or a class of the user's own."""

    builder: str | type
    data_dir: str | None
    keys: Keys
    prepare: str


def source(builder: str, name: str) -> Source:
    """A data set of TFDS by its builder's name."""

    def describe(options: Keys, request: Request) -> Dataset:
        known(builder)
        prepare = f"tfds build {builder} --file_format=array_record --data_dir=DATA_DIR"
        return describe_builder(name, _Origin(builder, request.data_dir, options, prepare))

    return Source(describe, load, Keys)


@functools.cache
def known(builder: str) -> None:
    """Raises DataError unless TFDS knows a builder by itself: otherwise it would import what the data's own files name."""
    import tensorflow_datasets as tfds

    name = builder.split("/")[0]
    if ":" in builder or name not in tfds.list_builders(with_community_datasets=False):
        names = tfds.list_builders(with_community_datasets=False) if ":" not in builder else []
        raise DataError(
            f"TFDS has no data set {builder!r}{did_you_mean(name, names) if names else ''}"
            " (a builder of your own is named as package.module:Class)"
        )


def own_builder(name: str, builder: type, options: Keys, request: Request) -> Dataset:
    """The data of a builder class of the user's own, which is prepared on first use."""
    return describe_builder(name, _Origin(builder, request.data_dir, options, ""))


def describe_builder(name: str, origin: _Origin) -> Dataset:
    """What a builder's info says of its data.

    Raises:
      DataError: the data is not prepared, or has no image and label that can be used.
    """
    prepared = _opened(name, origin)
    info, keys = prepared.builder.info, origin.keys
    image, label = _features(name, info, {"image_key": keys.image_key, "label_key": keys.label_key})
    shape, dtype, decoding = _image(name, keys.image_key, image, info)
    num_classes, names, kind = _label(name, keys.label_key, label)
    sizes = {split: found.num_examples for split, found in info.splits.items()}
    facts = {"version": info.version, "sizes": json.dumps(sizes), "names": "\0".join(names)}
    return Dataset(
        name,
        shape,
        num_classes,
        sizes,
        (),
        (),
        prepare=origin.prepare,
        decoding=decoding,
        classes=classes_of(names) if len(names) > 1 else "",
        image_dtype=dtype,
        label=kind,
        class_names=names,
        digest=digest_of(facts),
        origin=origin,
    )


def _open(name: str, origin: _Origin) -> Prepared:
    with _named(name, "opened"):
        root, path = tfds_folder.folder(origin.builder, origin.data_dir)
        command = origin.prepare.replace("DATA_DIR", root) or "the same command"
        try:
            with explained(f"delete {path}, then: {command}"):
                builder = tfds_folder.open_builder(origin.builder, origin.data_dir, path)
        except tfds_folder.OtherFormat:
            raise DataError(
                f"{name} is prepared under {root}, but not as array_record; prepare it in another dataset.data_dir"
            ) from None
        prepared = builder.is_prepared()
    if not prepared and origin.prepare:
        raise DataError(f"{name} is not prepared under {root}; run: {command}")
    if not prepared:
        to_stderr(f"preparing {name} in {builder.data_path}")
        with _named(name, "prepared"):
            builder.download_and_prepare()
    dataset = Dataset(name, (0,), None, {}, (), (), prepare=origin.prepare)
    return Prepared(dataset, builder, origin.keys)


@contextlib.contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Turns whatever a builder raises into a DataError: there is no such config, an argument is missing, or it fails."""
    try:
        yield
    except (DataError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too
        raise DataError(f"{name} cannot be {what} ({type(error).__name__}: {first_line(error)})") from error


_opened = Kept(_open)


def _features(name: str, info: Any, keys: dict[str, str]) -> list[Any]:
    """The features of these names, by the setting that gives them.  Raises DataError with a line for each that is missing."""
    features = dict(info.features.items()) if hasattr(info.features, "items") else {}
    missing = [
        f"dataset.kwargs.{key}: {name} has no feature {value!r}{did_you_mean(value, features)}"
        for key, value in keys.items()
        if value not in features
    ]
    if missing:
        raise DataError("\n".join(missing))
    return [features[value] for value in keys.values()]


def _image(name: str, key: str, feature: Any, info: Any) -> tuple[tuple[int, ...], str, Decoding | None]:
    """Shape and type of what a network gets, and how images are decoded if they have many sizes."""
    import tensorflow_datasets as tfds

    shape: tuple[Any, ...] = tuple(feature.shape or ())
    dtype = np.dtype(feature.np_dtype)
    encoded = isinstance(feature, tfds.features.Image)
    fixed = len(shape) in (1, 3) and None not in shape
    if dtype not in (np.uint8, np.float32) or not (fixed or (encoded and shape[-1] in (1, 3))):
        raise DataError(
            f"{name}: the feature {key!r} is {feature!r}; expected an image, or uint8 or float32 numbers of one shape"
        )
    total = sum(split.num_examples for split in info.splits.values()) * math.prod(shape) * dtype.itemsize if fixed else 0
    if fixed and (not encoded or (max(shape[:2]) <= SMALL_SIDE and total <= SMALL_TOTAL)):
        return shape, str(dtype), None
    if dtype != np.uint8 or shape[-1] not in (1, 3):
        raise DataError(
            f"{name}: images of many sizes, or large ones, must be uint8 with 1 or 3 channels; {key!r} is {feature!r}"
        )
    return (DEFAULT_SIZE, DEFAULT_SIZE, shape[-1]), "uint8", Decoding()


def _label(name: str, key: str, feature: Any) -> tuple[int | None, tuple[str, ...], Field]:
    """The number of classes, their names, and what a label is."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.ClassLabel):
        return feature.num_classes, tuple(feature.names or ()), Field((), "int32")
    shape = feature.shape
    if shape is not None and None not in shape and np.issubdtype(np.dtype(feature.np_dtype), np.floating):
        return None, (), Field(tuple(shape), "float32")
    raise DataError(
        f"{name}: the feature {key!r} is {feature!r}; expected a ClassLabel, or floating-point numbers of one shape"
    )


def load(dataset: Dataset, split: str, data_dir: str | None) -> Split:
    """Opens a split, or reads it into memory if its images have one size."""
    del data_dir  # the origin has it
    found = _opened(dataset.name, dataset.origin)
    prepared = Prepared(dataset, found.builder, dataset.origin.keys)
    if dataset.decoding is not None:
        return tfds_records.open_records(prepared, split)
    return read_split(dataset, split, lambda name: tfds_arrays.decoded(prepared, name))
