"""Trained weights of the dense network, which a run begins with: from timm, in safetensors, of another run, or orbax's."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lowrank_jax.exchange import load, timm
from lowrank_jax.exchange.fit import fitted
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.errors import UserError, WorkdirError
from lowrank_jax.experiment.hosts.processes import exchange
from lowrank_jax.experiment.training import recorded_data
from lowrank_jax.experiment.training.start import blank_images, init_dense
from lowrank_jax.experiment.training.stored import open_network
from lowrank_jax.experiment.workdir import step_folders
from lowrank_jax.experiment.workdir.identity import check_experiment, digest_of
from lowrank_jax.experiment.workdir.workdir import WEIGHTS, Workdir
from lowrank_jax.linen.factorize import merge
from lowrank_jax.paths import named_leaves
from lowrank_jax.text import first_line


class Trained(NamedTuple):
    """A dense network's variables.

    Attributes:
      variables: `params`, `batch_stats` and the model's other collections, NumPy's arrays.
      digest: of their names and values.
    """

    variables: dict[str, Any]
    digest: str


def read(config: Config) -> Trained:
    """The weights that `init.weights` names, as the config's network has them.

    Raises:
      ConfigError: they cannot be read, or are not this network's; every array that is missing, left over or of another shape
        is named.
    """
    source, network = config.init.weights or "", config.build_network()
    init = functools.partial(init_dense, network, blank_images(config.description))
    drawn = jax.jit(init)
    shapes = jax.eval_shape(init, np.uint32(config.seed))
    try:
        given = _read(source, config)
        variables = fitted(given, shapes, redraw=config.init.redraw, draw=lambda: drawn(np.uint32(config.seed)))
    except (ValueError, OSError, UserError) as error:
        raise ConfigError("config", _problem(source, error)) from None
    return Trained(variables, _digest(variables))


def _problem(source: str, error: Exception) -> list[str]:
    """What is wrong with a source, in lines; it is named once."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    first, *more = text.splitlines() or [first_line(error)]
    file = source.partition("=")[2] if source.startswith(load.TIMM) else source
    return [f"init.weights: {first}" if file and first.startswith(file) else f"init.weights: {source}: {first}", *more]


def _read(source: str, config: Config) -> Mapping[str, np.ndarray] | Callable[[Any], Mapping[str, np.ndarray]]:
    """Arrays by path."""
    if source.startswith(load.TIMM) or source.endswith(load.SAFETENSORS):
        return load.arrays(source)
    folder, step = _run(source)
    if folder is not None:
        variables = open_network(folder, step, _named_code(config), jax.local_devices()).variables()
        return named_leaves(jax.device_get({**variables, "params": merge(variables["params"])}))
    path = pathlib.Path(source)
    if not path.is_dir():
        raise ValueError("there is no such file or folder")
    try:
        found = ocp.StandardCheckpointer().restore(path.absolute())
    except Exception as error:  # orbax raises whatever its parts raise
        raise ValueError(f"neither a work directory nor a checkpoint of orbax: {first_line(error)}") from None
    return named_leaves(jax.tree.map(np.asarray, found))


def _run(source: str) -> tuple[str | None, str]:
    """The work directory and the step that a source names; no folder if it is none."""
    folder, at, step = source.rpartition("@")
    for candidate, which in ((source, "latest"), (folder if at else "", step)):
        if candidate and (Workdir(candidate).path / "config.json").exists():
            return candidate, which
    return None, ""


def _named_code(config: Config) -> list[str]:
    """The code that the config itself imports."""
    return [name for name in (config.model.name, config.objective.name, config.dataset.name) if ":" in name]


def _digest(variables: Any) -> str:
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(variables).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def before_the_first_step(folder: Workdir, config: Config) -> Trained | None:
    """The weights that a run still needs: none once it was saved, or where it begins with random ones.  Nothing is written.

    Raises:
      ConfigError, WorkdirError: see `settle`.
    """
    if config.init.weights is None or step_folders.stored(folder.checkpoints):
        return None
    trained = read(config)
    _check_record(folder, config, trained)
    return trained


def settle(folder: Workdir, config: Config, trained: Trained | None = None) -> Trained:
    """The weights that a run begins with, recorded in its work directory; every process calls this.

    Args:
      folder, config: of the run.
      trained: what was read already.

    Raises:
      ConfigError: see `read`.
      WorkdirError: the processes, or an earlier start of the run, found others.
    """
    trained = trained or read(config)
    for process, other in enumerate(exchange(trained.digest)):
        if other != trained.digest:
            raise WorkdirError(f"process {process} finds other weights at {config.init.weights} than this one")
    if not _check_record(folder, config, trained):
        folder.write_json(WEIGHTS, {"source": config.init.weights, "digest": trained.digest, "experiment": digest_of(config)})
    return trained


def _check_record(folder: Workdir, config: Config, trained: Trained) -> bool:
    """Whether an earlier start of the run has recorded its weights.

    Raises:
      WorkdirError: they were others, or the record is damaged.
    """
    record = folder.read_json(WEIGHTS)
    if record is None:
        return False
    try:
        check_experiment(record, config)
    except ValueError as error:
        raise WorkdirError(
            f"{folder.path}/{WEIGHTS} is damaged: {error}; remove it to begin with the weights as they are"
        ) from None
    if record.get("digest") != trained.digest:
        raise WorkdirError(
            f"{folder.path} began with other weights than {config.init.weights} has now; put them back, or use a new --workdir"
        )
    return True


def pixels(source: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of the pixels that trained weights are for; None where they are not known."""
    if source is None:
        return None
    if source.startswith(load.TIMM):
        return timm.pixels(source.removeprefix(load.TIMM).partition("=")[0])
    folder, _ = _run(source)
    dataset = None if folder is None else recorded_data.read(Workdir(folder))
    return None if dataset is None else (dataset.mean, dataset.std)


def with_pixels(config: Config, dataset: Dataset, say: Callable[[str], None]) -> Dataset:
    """The data set with the normalisation that the weights were trained with, unless the config gives one."""
    known = pixels(config.init.weights)
    given = config.dataset.mean, config.dataset.std
    if known is None or known == (dataset.mean, dataset.std):
        return dataset
    if given == (None, None):
        say(f"pixels are normalised as for the weights: mean {known[0]}, standard deviation {known[1]}")
        return dataclasses.replace(dataset, mean=known[0], std=known[1])
    say(f"dataset.mean and .std are {given[0]} and {given[1]}; the weights were trained with {known[0]} and {known[1]}")
    return dataset
