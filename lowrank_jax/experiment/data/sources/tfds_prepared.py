"""A TFDS data set on disk: opened, checked, and with what to do if it cannot be used."""

import contextlib
import dataclasses
import io
import shlex
from collections.abc import Iterator
from typing import Any

from etils import epath

from lowrank_jax.experiment.data.base import DataError, Dataset
from lowrank_jax.experiment.data.sources import tfds_folder
from lowrank_jax.text import first_line


@dataclasses.dataclass(frozen=True)
class Keys:
    """What the examples of a data set call the image and the label; the legal `dataset.kwargs` of TFDS's data sets."""

    image_key: str = "image"
    label_key: str = "label"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set whose folder is there.

    Attributes:
      dataset: what is expected of it.
      builder: TFDS's, which reads it as array_record.
      keys: of its examples.
    """

    dataset: Dataset
    builder: Any
    keys: Keys = Keys()

    @property
    def folder(self) -> epath.Path:
        return self.builder.data_path

    @property
    def remedy(self) -> str:
        """What to do about damage."""
        return _remedy(self.dataset, self.folder, _root(self.builder))

    def check_split(self, split: str) -> None:
        """Raises DataError unless the stored split is complete and as expected."""
        dataset, splits, expected = self.dataset, self.builder.info.splits, self.dataset.sizes[split]
        stored = splits[split].num_examples if split in splits else 0
        if stored != expected:
            subset = f'; if the subset is meant, set dataset.kwargs to {{"{split}_size": {stored}}}'
            raise DataError(
                f"{dataset.name}/{split} under {_root(self.builder)} has {stored:,} examples, {expected:,} expected;"
                f" {self.remedy}{subset if stored and dataset.partial else ''}"
            )
        with explained(self.remedy):
            tfds_folder.shards(self.builder, split)
        classes = getattr(self.builder.info.features[self.keys.label_key], "num_classes", None)
        if classes != dataset.num_classes:
            raise DataError(f"{self.folder} has {classes} classes, {dataset.num_classes} expected; {self.remedy}")


def open_prepared(dataset: Dataset, data_dir: str | None) -> Prepared:
    """Opens a data set, under TFDS's own folder if `data_dir` is None; one without a `prepare` command is made if need be.

    Raises:
      DataError: it is not prepared, not as array_record, or damaged.
    """
    if not data_dir:
        return _open_prepared(dataset, data_dir)
    if "://" not in data_dir:
        local = epath.Path(data_dir).expanduser()  # once, as TFDS takes some of it as it is
        if not dataset.prepare and not local.is_dir():
            raise DataError(f"dataset.data_dir: {data_dir} is not a folder; make it, or leave the setting out")
        return _open_prepared(dataset, str(local))
    if not data_dir.startswith(("gs://", "s3://")):
        raise DataError(f"dataset.data_dir: {data_dir} is neither a folder nor a bucket such as gs://bucket/folder")
    try:
        return _open_prepared(dataset, data_dir)
    except DataError:
        raise
    except Exception as error:  # whatever a store's library raises
        raise DataError(f"dataset.data_dir: {data_dir} cannot be read: {first_line(error)}") from None


def _open_prepared(dataset: Dataset, data_dir: str | None) -> Prepared:
    """The same, once it is known what kind of place it is."""
    root, path = tfds_folder.folder(dataset.name, data_dir)
    try:
        with explained(_remedy(dataset, path, root)):
            builder = tfds_folder.open_builder(dataset.name, data_dir, path)
    except tfds_folder.OtherFormat:
        where = f" under {data_dir}" if data_dir else ""
        raise DataError(
            f"{dataset.name} is prepared{where}, but not as array_record; prepare it in another folder: {dataset.prepare}"
        ) from None
    if not dataset.prepare:
        _make(builder)
    if not builder.is_prepared():
        raise DataError(f"{dataset.name} is not prepared under {_root(builder)}; run: {_command(dataset, _root(builder))}")
    return Prepared(dataset, builder)


def _make(builder: Any) -> None:
    """Prepares the digits on first use; they ship with scikit-learn."""
    import tensorflow_datasets as tfds

    # TFDS announces a download; there is none.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except (OSError, RuntimeError) as error:  # array_record has its own for a full disk
        raise DataError(f"{builder.data_path} cannot be made: {first_line(error)}") from None


@contextlib.contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Turns errors about stored data into a DataError that says what to do."""
    try:
        yield
    except tfds_folder.Damaged as error:
        raise DataError(f"{error}; {remedy}") from None
    except PermissionError as error:
        raise DataError(f"{error.filename}: {error.strerror}; this user needs permission to read it") from None


def _root(builder: Any) -> str:
    """TFDS's data folder."""
    return str(builder.data_dir_root)


def _command(dataset: Dataset, root: str) -> str:
    """What prepares a data set in that folder."""
    return dataset.prepare.replace("DATA_DIR", shlex.quote(root)) or "the same command"


def _remedy(dataset: Dataset, path: epath.Path, root: str) -> str:
    """What to do about damaged data; TFDS would reuse a folder that exists."""
    return f"delete {shlex.quote(str(path))}, then: {_command(dataset, root)}"
