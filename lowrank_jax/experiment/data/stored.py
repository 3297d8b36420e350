"""The folder in which TFDS keeps a data set: where it is, and whether all of it is there."""

import contextlib
import tempfile
from collections.abc import Sequence
from typing import Any

from etils import epath


class Damaged(Exception):
    """A part of what was prepared is missing or broken; the message says which.  TFDS itself would take it for complete."""


class OtherFormat(Exception):
    """It is prepared, and not as array_record."""


def folder(name: str, data_dir: str | None) -> tuple[str, epath.Path]:
    """TFDS's data folder, and where in it the version is kept that it would prepare, whatever is there."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    with tempfile.TemporaryDirectory() as empty:  # a builder that finds something reads it, and may fail to
        relative = tfds.builder(name, data_dir=empty).data_path.relative_to(empty)
    root = epath.Path(data_dir or constants.DATA_DIR).expanduser()
    return str(root), root / relative


def open_builder(name: str, data_dir: str | None, path: epath.Path) -> Any:
    """TFDS's builder.

    Args:
      name, data_dir: of the data set.
      path: its version's folder, from `folder`.

    Raises:
      Damaged: there is a folder, but nothing in it that says what it holds.
      PermissionError: it may not be read.
      OtherFormat: see there.
    """
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    info = path / "dataset_info.json"
    may_read([path, info])
    if path.exists() and not info.exists():
        raise Damaged(f"{info} is missing")
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (ParseError, AssertionError, RuntimeError):  # no JSON, another data set's, no text
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
      PermissionError: one may not be read.
    """
    present = {path.name for path in builder.data_path.iterdir()}
    files = [builder.data_path / epath.Path(path).name for path in builder.info.splits[split].filepaths]
    missing = [file.name for file in files if file.name not in present]
    if missing:
        raise Damaged(f"{builder.data_path} lacks {len(missing)} of {len(files)} files, such as {missing[0]}")
    may_read(files)
    return files


def check_all(builder: Any) -> None:
    """Raises Damaged unless every file is there and opens; PermissionError if one may not be read."""
    from array_record.python import array_record_module  # type: ignore[attr-defined]

    for split in builder.info.splits:
        for file in shards(builder, split):
            if not array_record_module.ArrayRecordReader(str(file)).ok():
                raise Damaged(f"{file} is damaged")


def may_read(paths: Sequence[epath.Path]) -> None:
    """Raises PermissionError where a local folder or file is not for this user: TFDS takes it for missing or for broken."""
    for path in paths:
        if "://" in str(path):
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            next(path.iterdir(), None) if path.is_dir() else path.open("rb").close()
