"""TFDS data sets whose images have one size and fit into memory."""

import uuid
import zipfile
from typing import Any

import numpy as np
from etils import epath

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.data.arrays import Arrays, read_split
from lowrank_jax.experiment.data.base import DataError, Dataset, Source
from lowrank_jax.experiment.data.sources import tfds_folder
from lowrank_jax.experiment.data.sources.tfds_prepared import Keys, Prepared, explained, open_prepared
from lowrank_jax.text import first_line


def source(dataset: Dataset) -> Source:
    """A data set of TFDS's by its description, whose name is TFDS's."""
    return Source(lambda options, request: dataset, _load)


def _load(dataset: Dataset, split: str, data_dir: str | None) -> Arrays:
    return read_split(dataset, split, lambda name: decoded(open_prepared(dataset, data_dir), name))


def decoded(prepared: Prepared, split: str) -> Arrays:
    """A whole split, decoded; by the next run it is found decoded.

    Raises:
      DataError: it is damaged, or not as expected.
    """
    dataset, keys = prepared.dataset, prepared.keys
    other = "" if keys == Keys() else f"-{keys.image_key}-{keys.label_key}"
    cache = prepared.folder / f"decoded-{split}{other}.npz"
    arrays = _read_cache(cache)
    if arrays is None or not _fits(arrays, dataset, split):
        prepared.check_split(split)
        with explained(prepared.remedy):
            tfds_folder.check_all(prepared.builder)
            examples = _read_all(prepared, split)
        arrays = Arrays(
            np.stack([example[keys.image_key] for example in examples]),
            np.array([example[keys.label_key] for example in examples], dataset.label.dtype),
        )
        if not _fits(arrays, dataset, split):
            raise DataError(
                f"{dataset.name}/{split}: a label is not one of the {dataset.num_classes} classes; choose another split"
            )
        _write_cache(cache, arrays)
    return arrays


def _read_all(prepared: Prepared, split: str) -> list[dict[str, Any]]:
    """Raises Damaged if a record cannot be read."""
    stored: Any = prepared.builder.as_data_source(split)  # type: ignore[call-arg]
    try:
        return stored.__getitems__(range(len(stored)))
    except Exception as error:  # of array_record, protobuf or an image's decoder
        raise tfds_folder.Damaged(f"{prepared.folder}: the records of {split} cannot be read ({first_line(error)})") from None


def _read_cache(path: epath.Path) -> Arrays | None:
    """Pixels that an earlier run decoded: decoding 60,000 PNGs takes longer than many a run."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return Arrays(arrays["images"], arrays["labels"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _fits(decoded: Arrays, dataset: Dataset, split: str) -> bool:
    """Whether these can be the images and labels of the split."""
    images, labels, size = decoded.images, decoded.labels, dataset.sizes[split]
    kinds = (images.dtype, images.shape, labels.dtype, labels.shape)
    if kinds != (dataset.image_dtype, (size, *dataset.image_shape), dataset.label.dtype, (size, *dataset.label.shape)):
        return False
    return dataset.num_classes is None or bool(labels.min() >= 0 and labels.max() < dataset.num_classes)


def _write_cache(path: epath.Path, arrays: Arrays) -> None:
    """Writes nothing if the folder is read-only."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with interrupts.cleaning_up(lambda: partial.unlink(missing_ok=True)):
        try:
            with partial.open("wb") as file:
                np.savez(file, images=arrays.images, labels=arrays.labels)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
