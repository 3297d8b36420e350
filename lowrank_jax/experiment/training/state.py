"""What training carries from step to step, and where its randomness comes from."""

import dataclasses
import zlib
from typing import Any

import flax.struct
import jax

from lowrank_jax.experiment.guided import without_guides


@flax.struct.dataclass
class TrainState:
    """All that has to be saved for training to resume exactly.

    Attributes:
      step: updates made so far, an int32 scalar.
      params: the parameters, factor pairs included, in self-guided training with their guides.
      batch_stats: BatchNorm's running statistics; under jit they are those of the global batch.
      opt_state: the optimiser's state.
      ema: running averages of `params` and `batch_stats`, by these names; empty where none are kept.  Of a factor pair the
        factors are averaged, not their product; guides, which are never evaluated, are not.
      collections: the model's other mutable collections, by name.  They are not averaged: a mean of counters or of power
        iteration vectors need not mean anything, so the averages are evaluated with the collections as they are.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = flax.struct.field(default_factory=dict)
    collections: Any = flax.struct.field(default_factory=dict)

    def variables(self) -> dict[str, dict[str, Any]]:
        """See `evaluated_variables`."""
        return evaluated_variables(self.saved())

    def saved(self) -> dict[str, Any]:
        """The fields by name, as a checkpoint holds them: without `collections` where the model has no others."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields if self.collections else {name: value for name, value in fields.items() if name != "collections"}


def evaluated_variables(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a state is evaluated, by the suffix of its metrics: the averages where there are any, and the raw weights.

    In self-guided training that is the low-rank network alone.

    Args:
      parts: fields of a `TrainState` by name: `params` and `batch_stats`, and `ema` and `collections` where there are any.
    """
    collections = parts.get("collections") or {}
    raw = {"params": without_guides(parts["params"]), "batch_stats": parts["batch_stats"], **collections}
    average = parts.get("ema")
    return {"": {**average, **collections}, "_raw": raw} if average else {"": raw}


def key(seed: Any, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of a stream of randomness at a step: nothing random is ever stored."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode())), step)
