"""What training carries from step to step, and where its randomness comes from."""

import zlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from lowrank_jax.linen.factorize import factorize
from lowrank_jax.planning.plans import Plan


@flax.struct.dataclass
class TrainState:
    """All that has to be saved for training to go on exactly.

    Attributes:
      step: updates made so far, an int32 scalar.
      params: the parameters, factor pairs included.
      batch_stats: BatchNorm's running statistics; under jit they are those of the global batch.
      opt_state: the optimiser's state.
      ema: running averages of `params` and `batch_stats`, by these names; empty where none are kept.  Of a factor pair the
        factors are averaged, not their product.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = flax.struct.field(default_factory=dict)

    def variables(self) -> dict[str, dict[str, Any]]:
        """See `evaluated_variables`."""
        return evaluated_variables({"params": self.params, "batch_stats": self.batch_stats, "ema": self.ema})


def evaluated_variables(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a state is evaluated, by the suffix of its metrics: the averages where there are any, and the raw weights.

    Args:
      parts: `params`, `batch_stats` and `ema` of a `TrainState`.
    """
    raw = {"params": parts["params"], "batch_stats": parts["batch_stats"]}
    return {"": parts["ema"], "_raw": raw} if parts["ema"] else {"": raw}


def key(seed: Any, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of a stream of randomness at a step: nothing random is ever stored."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode())), step)


def init_dense(model: nn.Module, images: jax.Array, seed: Any) -> Any:
    """The model's own initialisation: its variables."""
    return model.init(key(seed, "init"), images)


def init_params(
    model: nn.Module, plan: Plan, images: jax.Array, seed: Any, moments: dict[str, jax.Array] | None = None
) -> tuple[Any, Any]:
    """The model's own initialisation, then the plan's factorisation: `(params, batch_stats)`.  Made to run under `jit`.

    Args:
      model, plan: the network, and which of its kernels are factored.
      images: of the shape that the model takes; their values do not matter.
      seed: of the run, a whole number or a uint32 scalar.
      moments: of the layers' inputs, for a data-aware factorisation.
    """
    # Drawn once, rather than anew in every operation that reads a kernel, which a TPU's compiler would take minutes for.
    variables = jax.lax.optimization_barrier(init_dense(model, images, seed))
    return factorized(variables, plan, seed, moments)


def factorized(variables: Any, plan: Plan, seed: Any, moments: dict[str, jax.Array] | None = None) -> tuple[Any, Any]:
    """`init_params` from variables that are drawn already."""
    params = factorize(variables["params"], plan, key=key(seed, "factorize"), moments=moments)
    return params, variables.get("batch_stats", {})


def init_state(
    model: nn.Module,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    images: jax.Array,
    seed: Any,
    moments: dict[str, jax.Array] | None = None,
    *,
    ema: bool = False,
) -> TrainState:
    """A state before its first step, arguments as in `init_params`; made to run under `jit`, decompositions included."""
    params, batch_stats = init_params(model, plan, images, seed, moments)
    return fresh_state(params, batch_stats, optimizer, ema=ema)


def fresh_state(params: Any, batch_stats: Any, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """A state before its first step, from its parameters."""
    average = {"params": params, "batch_stats": batch_stats} if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), average)
