"""What training carries from step to step, and where its randomness comes from."""

import zlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from lowrank_jax.plans import Plan
from lowrank_jax.surgery import factorize


@flax.struct.dataclass
class TrainState:
    """All that has to be saved for training to go on exactly.

    Attributes:
      step: updates made so far, an int32 scalar.
      params: the parameters, factor pairs included.
      batch_stats: BatchNorm's running statistics; under jit they are those of the global batch.
      opt_state: the optimiser's state.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of a stream of randomness at a step: nothing random is ever stored."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode())), step)


def init_params(model: nn.Module, plan: Plan, images: jax.Array, seed: int) -> tuple[Any, Any]:
    """The model's own initialisation, then the plan's factorisation: `(params, batch_stats)`.  Made to run under `jit`."""
    variables = model.init(key(seed, "init"), images)
    params = factorize(variables["params"], plan, key=key(seed, "factorize"))
    return params, variables.get("batch_stats", {})


def init_state(
    model: nn.Module, plan: Plan, optimizer: optax.GradientTransformation, images: jax.Array, seed: int
) -> TrainState:
    """A state before its first step; made to run under `jit`, decompositions included."""
    params, batch_stats = init_params(model, plan, images, seed)
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
