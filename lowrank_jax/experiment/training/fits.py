"""Whether a run fits into the memory at hand, as far as that is certain: what cannot fit is refused before it is tried."""

import itertools
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lowrank_jax.experiment.data.pipeline import shard_of
from lowrank_jax.experiment.hosts.sharding import bytes_per_device
from lowrank_jax.experiment.memory import TooLarge, beyond, beyond_machine

if TYPE_CHECKING:
    from lowrank_jax.experiment.training.build import Experiment


def check_training(experiment: "Experiment") -> None:
    """Checks the state, and batches as they are read.

    Raises:
      TooLarge: something does not fit.
    """
    sizes = experiment.config.batch_size, experiment.config.eval.batch_size
    _check(
        _beyond_devices("the parameters and the optimiser's state (model.kwargs)", bytes_per_device(experiment.shapes)),
        *(_beyond_batch(experiment, key, size) for key, size in zip(("batch_size", "eval.batch_size"), sizes, strict=True)),
    )


def check_evaluation(experiment: "Experiment", batch_size: int) -> None:
    """The same for an evaluation."""
    params = bytes_per_device(experiment.shapes.params)
    _check(_beyond_devices("the parameters (model.kwargs)", params), _beyond_batch(experiment, "eval.batch_size", batch_size))


def check_program(compiled: jax.stages.Compiled, what: str) -> None:
    """The same for a program: all that it holds at a time."""
    known: Any = compiled.memory_analysis()
    if known is not None:
        held = known.argument_size_in_bytes + known.output_size_in_bytes - known.alias_size_in_bytes
        _check(_beyond_devices(f"{what} (batch_size, optim.accumulate)", held + known.temp_size_in_bytes))


def _beyond_devices(what: str, part: int) -> list[str]:
    """Of so many bytes on each device of this process."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":  # they share the machine's memory
        return beyond_machine(what, part * len(devices))
    return beyond(f"{what} on a device", part, (devices[0].memory_stats() or {}).get("bytes_limit", math.inf), "it")


def _beyond_batch(experiment: "Experiment", key: str, size: int) -> list[str]:
    """Of the examples of a batch that this process reads."""
    shard = shard_of(experiment.mesh)
    images = size * len(shard.parts) // shard.count
    fields = experiment.dataset.fields.values()
    each = sum(math.prod(field.shape) * np.dtype(field.dtype).itemsize for field in fields)
    return beyond_machine(f"a batch of {images:,} images ({key})", images * each)


def _check(*found: list[str]) -> None:
    if problems := [*itertools.chain(*found)]:
        raise TooLarge(problems)
