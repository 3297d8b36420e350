"""`arrays:FILE.npz`: NumPy arrays in a file."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_jax.experiment.data.base import DataError, Dataset, Request, Source, Split
from lowrank_jax.experiment.data.kept import Kept
from lowrank_jax.experiment.data.own import Data
from lowrank_jax.experiment.data.sources.code import check_data, describe_found, load_found
from lowrank_jax.experiment.data.sources.folder import refuse_remote
from lowrank_jax.text import first_line


def source(path: str, name: str) -> Source:
    """The arrays in a file; `name` is what the config calls them."""

    def describe(options: Any, request: Request) -> Dataset:
        del options
        refuse_remote(path, request)
        file = str(pathlib.Path(request.data_dir or "").expanduser() / pathlib.Path(path).expanduser())
        return describe_found(name, _Origin(name, file), _kept(name, file).found, None)

    return Source(describe, _load)


@dataclasses.dataclass(frozen=True)
class _Origin:
    name: str
    file: str


@dataclasses.dataclass(frozen=True)
class _Read:
    file: str
    found: Any


def _read(name: str, file: str) -> _Read:
    try:
        with open(file, "rb") as opened:  # noqa: PTH123 - NumPy leaves a damaged file open that it opened itself
            stored = np.load(opened, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise DataError(f"{file} holds a single array; expected a file of np.savez with train_image, train_label, ...")
            arrays = {key: stored[key] for key in stored.files}
    except FileNotFoundError:
        raise DataError(f"{file} does not exist") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} cannot be read as arrays of NumPy's: {first_line(error)}") from None
    return _Read(file, check_data(name, _data(file, arrays)))


def _stamp(read: _Read) -> tuple[int, int] | None:
    try:
        found = pathlib.Path(read.file).stat()
        return found.st_mtime_ns, found.st_size
    except OSError:
        return None


_kept = Kept(_read, _stamp)

_WORDS = {"images": "image", "labels": "label", "x": "image", "y": "label"}


def _data(file: str, arrays: Mapping[str, np.ndarray]) -> Data:
    """Splits by the names of the arrays: `train_image` and `train_label`, also in the plural, or `x_train` and `y_train`."""
    splits: dict[str, dict[str, np.ndarray]] = {}
    facts = {key: arrays[key] for key in ("class_names", "mean", "std", "num_classes") if key in arrays}
    for key, array in arrays.items():
        if key in facts:
            continue
        split, _, field = key.partition("_")
        if split.lower() in ("x", "y"):
            split, field = field, split.lower()
        if not split or not field:
            raise DataError(f"{file}: the array {key!r} names no split; expected names like train_image and train_label")
        known = splits.setdefault(split, {})
        if _WORDS.get(field, field) in known:
            what = f"{_WORDS.get(field, field)}s of {split!r}"
            raise DataError(f"{file}: the {what} are there under two names, {key!r} for one; keep one")
        known[_WORDS.get(field, field)] = array
    return Data(
        splits,
        **{key: array.tolist() for key, array in facts.items()},
    )


def _load(dataset: Dataset, split: str, data_dir: str | None) -> Split:
    del data_dir
    return load_found(dataset, _kept(dataset.origin.name, dataset.origin.file).found, split)
