"""The folder in which TFDS keeps a data set: where it is, and whether it is complete."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from etils import epath

from lowrank_jax.experiment import temporary


class Damaged(Exception):
    """A prepared file is missing or damaged; the message says which.  TFDS would not notice."""


class OtherFormat(Exception):
    """The data set is prepared, but not as array_record."""


def folder(name: str | type, data_dir: str | None) -> tuple[str, epath.Path]:
    """TFDS's data folder, and the folder in it of the version that TFDS would prepare, whether it exists or not.

    `name` may be a builder class instead.
    """
    from tensorflow_datasets.core import constants

    root = epath.Path(data_dir or constants.DATA_DIR).expanduser()
    if name == "digits":
        return str(root), root / "digits" / str(_digits().VERSION)
    with temporary.folder("lowrank_empty_") as empty:  # a builder reads data that it finds, and may fail to
        relative = _builder(name, empty).data_path.relative_to(empty)
    return str(root), root / relative


def _builder(name: str | type, data_dir: str | None) -> Any:
    """The builder of a data set of TFDS's, of this project's own, or of a class."""
    import tensorflow_datasets as tfds

    if isinstance(name, type):
        make: Any = name
    else:
        make = _digits() if name == "digits" else functools.partial(tfds.builder, name)
    return make(data_dir=data_dir, file_format="array_record")


def _digits() -> Any:
    from lowrank_jax.experiment.data.digits.digits_dataset_builder import Builder

    return Builder


def open_builder(name: str | type, data_dir: str | None, path: epath.Path) -> Any:
    """TFDS's builder.

    Args:
      name, data_dir: of the data set, as in `folder`.
      path: its version's folder, from `folder`.

    Raises:
      Damaged: the folder exists, but not the file in it that describes the data set, or that file is damaged.
      PermissionError: this user may not read it.
      OtherFormat: it is not stored as array_record.
    """
    from google.protobuf.json_format import ParseError

    info = path / "dataset_info.json"
    may_read([path, info])
    if path.exists() and not info.is_file():
        raise Damaged(f"{info} is missing")
    try:
        return _builder(name, data_dir)
    except (ParseError, AssertionError, RuntimeError, UnicodeDecodeError):  # not JSON, another data set's, not text
        if not info.exists():
            raise
        raise Damaged(f"{info} is damaged") from None
    except ValueError as error:
        if "File format" not in str(error):
            raise
        raise OtherFormat(str(error)) from None


def shards(builder: Any, split: str) -> list[epath.Path]:
    """The files of a split.

    Raises:
      Damaged: some are missing.
      PermissionError: this user may not read one.
    """
    present = {path.name for path in builder.data_path.iterdir()}
    files = [builder.data_path / epath.Path(path).name for path in builder.info.splits[split].filepaths]
    missing = [file.name for file in files if file.name not in present]
    if missing:
        raise Damaged(f"{builder.data_path} lacks {len(missing)} of {len(files)} files, such as {missing[0]}")
    may_read(files)
    return files


def check_all(builder: Any) -> None:
    """Raises Damaged unless every file is there, opens and has its records; PermissionError if this user may not read one."""
    from array_record.python import array_record_module  # type: ignore[attr-defined]

    for split in builder.info.splits:
        for file, expected in zip(shards(builder, split), builder.info.splits[split].shard_lengths, strict=True):
            reader = array_record_module.ArrayRecordReader(str(file))
            if not reader.ok():
                raise Damaged(f"{file} is damaged")
            if (records := reader.num_records()) != expected:
                raise Damaged(f"{file} has {records:,} records, and should have {expected:,}")


def may_read(paths: Sequence[epath.Path]) -> None:
    """Raises PermissionError if this user may not read a local folder or file; TFDS takes it for missing or damaged."""
    for path in paths:
        if "://" in str(path):
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            next(path.iterdir(), None) if path.is_dir() else path.open("rb").close()
