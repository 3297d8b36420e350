"""What a run was trained on, in `dataset.json` of its work directory, so that it resumes on the same and is evaluated alike."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator

import jax

from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import Dataset, Split
from lowrank_jax.experiment.data.statistics import measured
from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.hosts.processes import exchange
from lowrank_jax.experiment.workdir.dataset_record import changes, from_record, misfits, to_record
from lowrank_jax.experiment.workdir.identity import check_experiment, digest_of
from lowrank_jax.experiment.workdir.workdir import Workdir

NAME = "dataset.json"


def read(folder: Workdir, config: Config | None = None) -> Dataset | None:
    """The data set that a run was trained on; None if it has not begun, or began before this was recorded.

    Args:
      folder: the run's.
      config: the run's, to see that the record is too; earlier versions wrote none of it.

    Raises:
      WorkdirError: the record is damaged, or another run's.
    """
    record = folder.read_json(NAME)
    try:
        if record is not None and config is not None:
            check_experiment(record, config)
        return None if record is None else from_record(record)
    except ValueError as error:
        raise WorkdirError(
            f"{folder.path}/{NAME} is damaged: {error}; remove it, and resume the run to have it written anew"
        ) from None


def settle(folder: Workdir, config: Config, dataset: Dataset, train: Split, say: Callable[[str], None]) -> Dataset:
    """The data set with the mean and deviation of its training split, which are measured once and kept.

    Args:
      folder: the run's, locked.
      config: the run's.
      dataset: as it is described now.
      train: the training split.
      say: takes a line.

    Raises:
      WorkdirError: it is not what the run began with, or the processes have different data.
      DataError: it cannot be read.
    """
    old = read(folder, config)
    if old and (different := changes(old, dataset)):
        raise WorkdirError(
            f"{folder.path}: {dataset.name} is not what this run began with: {'; '.join(different)}."
            " Put it back as it was, or begin in a new --workdir."
        )
    if old:
        dataset = dataclasses.replace(dataset, mean=old.mean, std=old.std)
    elif jax.process_index() == 0:
        dataset = _measured(dataset, train, say)
    dataset = _agreed(dataset)
    if not old:
        folder.write_json(NAME, {**to_record(dataset), "experiment": digest_of(config)})
    return dataset


def _measured(dataset: Dataset, train: Split, say: Callable[[str], None]) -> Dataset:
    if dataset.mean and dataset.std:
        return dataset
    say(f"measuring mean and standard deviation of {len(train):,} training examples of {dataset.name}")
    dataset = measured(dataset, train, say)
    say(f"mean {_listed(dataset.mean)}, standard deviation {_listed(dataset.std)}; kept in {NAME}")
    return dataset


def _listed(values: tuple[float, ...]) -> str:
    shown = " ".join(f"{value:.4g}" for value in values[:4])
    return shown if len(values) <= 4 else f"{shown} ... ({len(values)} numbers)"


def _agreed(dataset: Dataset) -> Dataset:
    """The data set with process 0's mean and deviation."""
    ours = {"mean": dataset.mean, "std": dataset.std, "digest": dataset.digest, "sizes": dataset.sizes}
    first, *others = [json.loads(text) for text in exchange(json.dumps(ours))]
    for process, theirs in enumerate(others, start=1):
        if any(theirs[name] != first[name] for name in ("digest", "sizes")):
            raise WorkdirError(f"process {process} reads other data than process 0: all need the same files of {dataset.name}")
    return dataclasses.replace(dataset, mean=tuple(first["mean"]), std=tuple(first["std"]))


@contextlib.contextmanager
def used(folder: Workdir) -> Iterator[None]:
    """Within, a run's own data is what it was trained on, and is not looked at: its network needs no more.

    Raises:
      WorkdirError: the record is damaged.
    """
    folder.check_reachable()
    with datasets.recorded(read(folder)):
        yield


def as_trained(config: Config, folder: Workdir) -> Config:
    """The config of a run with the mean and deviation that it was trained with.

    Raises:
      WorkdirError: the record is damaged or missing.
    """
    old, now = read(folder, config), config.description
    if old is None and not (now.mean and now.std):
        raise WorkdirError(
            f"{folder.path}/{NAME} is missing, which has the mean of {now.name}; resume the run to have it measured"
        )
    if old is None:
        return config
    return dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, mean=old.mean, std=old.std))


def looked_at(config: Config, folder: Workdir) -> tuple[Dataset, tuple[str, ...]]:
    """A run's data as it is now, and what of it has changed since the run was trained.

    Raises:
      DataError: it cannot be used.
      WorkdirError: the run's network was made for other inputs or labels.
    """
    old, now = read(folder), config.description
    if old is None:
        return now, ()
    if different := misfits(old, now):
        raise WorkdirError(
            f"{folder.path}: {now.name} is not what this run was trained on: {'; '.join(different)}."
            " Put it back as it was, or choose other data by --dataset."
        )
    return now, tuple(changes(old, now))
