"""What a training step will take of a TPU, from the TPU's own compiler; no TPU is needed, and nothing runs."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from lowrank_jax import experiment as experiments
from lowrank_jax.schema import Config

EXTRA = "pip install 'lowrank_jax[tpu]'"


class PreflightError(Exception):
    """There is no compiler, or it refuses; the message says why."""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """The compiler's estimates for one chip.

    Attributes:
      params, macs: of the network; MACs of one image's forward pass.
      state_bytes: parameters, BatchNorm statistics, the optimiser's state and averages, as they lie on the chip.
      peak_bytes: at the worst moment of a training step.
      flops: of a training step.
    """

    params: int
    macs: int
    state_bytes: int
    peak_bytes: int
    flops: float


def topology(name: str) -> Sequence[Any]:
    """The chips of a TPU slice such as "v5e:4x4", which need not be there.

    Raises:
      PreflightError: libtpu is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    # Without these libtpu asks the machine that it is on what kind of TPU it is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        import libtpu as libtpu  # type: ignore[import-not-found]
    except ImportError:
        raise PreflightError(f"libtpu, which holds the TPU's compiler, is not installed: {EXTRA}") from None
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu has no error type of its own
        raise PreflightError(f"topology {name!r}: {str(error).splitlines()[0]}") from None


def footprint(config: Config, devices: Sequence[Any]) -> Footprint:
    """Compiles the training step of a config for some devices.

    At the lowest effort: on ResNet-50 the FLOPs are those of full effort and the memory within two per cent.

    Raises:
      PreflightError: it does not compile, most often because it does not fit.
    """
    experiment = experiments.build(config, devices=devices)
    lowered = experiment.lower_train_step()
    level = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise PreflightError(str(error).splitlines()[0]) from None
    finally:
        jax.config.update("jax_optimization_level", level)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and cost is not None
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(experiment.shapes)
    )
    return Footprint(experiment.plan.params, experiment.plan.macs, state, memory.peak_memory_in_bytes, cost["flops"])
