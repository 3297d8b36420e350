"""TFDS data sets whose images have one size and fit into memory."""

import uuid
import zipfile
from typing import Any

import numpy as np
from etils import epath

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.data.arrays import Arrays, read_split
from lowrank_jax.experiment.data.base import Dataset, Source
from lowrank_jax.experiment.data.sources import tfds_folder
from lowrank_jax.experiment.data.sources.tfds_prepared import explained, open_prepared


def source(dataset: Dataset) -> Source:
    """A data set of TFDS's by its description, whose name is TFDS's."""
    return Source(lambda options, request: dataset, _load)


def _load(dataset: Dataset, split: str, data_dir: str | None) -> Arrays:
    return read_split(dataset, split, lambda name: _read(dataset, name, data_dir))


def _read(dataset: Dataset, split: str, data_dir: str | None) -> Arrays:
    prepared = open_prepared(dataset, data_dir)
    cache = prepared.folder / f"decoded-{split}.npz"
    decoded = _read_cache(cache)
    if decoded is None or not _fits(decoded, dataset, split):
        prepared.check_split(split)
        with explained(prepared.remedy):
            tfds_folder.check_all(prepared.builder)
        stored: Any = prepared.builder.as_data_source(split)  # type: ignore[call-arg]
        examples = stored.__getitems__(range(len(stored)))
        decoded = Arrays(
            np.stack([example["image"] for example in examples]),
            np.array([example["label"] for example in examples], np.int32),
        )
        _write_cache(cache, decoded)
    return decoded


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
    if kinds != (np.uint8, (size, *dataset.image_shape), np.int32, (size,)):
        return False
    return labels.min() >= 0 and labels.max() < dataset.num_classes


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
