"""The relative risk of a kernel's projection at every rank at once, from one decomposition.

In the leading left singular vectors an output j keeps c_j(r) = Σ_{i≤r} (σ_i B_ji)² of its squared length.  So the cosines of all
ranks are a cumulative sum, and each gives the output's risk at its best length (docs/mathematics.md, section 12).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from lowrank_jax.projection import activations, linalg
from lowrank_jax.projection.activations import Activation, ActivationLike
from lowrank_jax.projection.batched import PaddedStack, measure, padded_stacks
from lowrank_jax.projection.linalg import grouped, lengths, ratio, root
from lowrank_jax.projection.stack import Stack

_LENGTHS, _COSINES = 17, 129  # of the table of a risk that takes a series


class _Outputs(NamedTuple):
    """What is known of the outputs of kernels, in each kernel's unit.

    Attributes:
      length: `[k, outputs]`.
      cosine: with the leading subspace of every rank, `[k, p, outputs]`.
    """

    length: jax.Array
    cosine: jax.Array


def risk_curve(
    w: jax.Array, *, activation: ActivationLike = "relu", group: int = 1, normalized: bool = False
) -> jax.Array:
    """R(r) / R(0) of the kernel projection at every rank r, in the leading singular subspace.

    Args:
      w: `[n, m]`.
      activation, group: as in `kernel_projection`.
      normalized: a normalisation layer follows, which gives all outputs the same length: each counts the same.

    Returns:
      `[min(n, m)]`, float32 or better: falling from rank 1 to 0 at full rank.

    Raises:
      ValueError: as in `kernel_projection`.
    """
    linalg.check_matrix(w)
    linalg.check_group(w, group)
    act = activations.get(activation)
    return risk_curves([Stack(None, w[None], 1, act, group)], [normalized])[0][0]


def risk_curves(stacks: Sequence[Stack], normalized: Sequence[bool]) -> list[jax.Array]:
    """`risk_curve` of many kernels: `[k, p]` for every stack, p = min(n, m) of its matrices; their ranks do not matter.

    Decompositions and products are compiled for few shapes, as in `batched.project`.
    """
    found: dict[int, jax.Array] = {}
    for part, outputs in zip(parts := padded_stacks(stacks), _outputs(parts), strict=True):
        flags = np.repeat([normalized[i] for i in part.bucket.members], part.bucket.counts)
        curves = jnp.concatenate([_curves(act, part, run, outputs, flags) for act, run in part.runs()])
        for i, of_one in zip(part.bucket.members, part.bucket.split(curves), strict=True):
            found[i] = of_one[:, : min(stacks[i].w.shape[1:])]
    return [found[i] for i in range(len(stacks))]


@linalg.highest_precision
def _outputs(parts: Sequence[PaddedStack]) -> list[_Outputs]:
    sides = [jnp.asarray(part.sides) for part in parts]
    # As if no rank were left out: what one decomposition cannot resolve is nothing next to the whole.
    spans = linalg.singular_vectors([part.w for part in parts], sides, [jnp.zeros_like(side) for side in sides])
    return [_kept(part, vectors) for part, vectors in zip(parts, spans, strict=True)]


def _kept(part: PaddedStack, vectors: jax.Array) -> _Outputs:
    if part.is_wide:
        squares = (vectors.mT @ part.w) ** 2
    else:
        squares = jnp.sum((part.w @ vectors) ** 2, axis=1)[..., None] * vectors.mT**2
    length = lengths(part.w, part.group)
    kept = jnp.cumsum(jnp.sum(grouped(squares, part.group), axis=-2), axis=1)
    # Of its own sum, so that nothing is lost at full rank.
    return _Outputs(length, jnp.minimum(root(ratio(kept, kept[:, -1:])), 1))


def _curves(act: Activation, part: PaddedStack, run: slice, outputs: _Outputs, normalized: np.ndarray) -> jax.Array:
    """`[k, p]` of the kernels in `run`, which are followed by one activation."""
    flags = jnp.asarray(normalized[run])[:, None]
    length, cosine = outputs.length[run], outputs.cosine[run]
    size = jnp.where(flags, (length > 0).astype(length.dtype), length * measure(act, part.unit[run, 0]))
    whole = act.risk(size, jnp.zeros_like(size), jnp.zeros_like(size))
    if isinstance(act, activations.Homogeneous):
        share = 1 - jnp.maximum(act.h(cosine), 0) ** 2
    else:
        share = _tabulated(act, size, cosine)
    return ratio(jnp.sum(share * whole[:, None], axis=-1), jnp.sum(whole, axis=-1)[:, None])


def _tabulated(act: Activation, size: jax.Array, cosine: jax.Array) -> jax.Array:
    """What outputs of sizes `[k, outputs]` lose of their function at their best lengths, by cosine `[k, ranks, outputs]`.

    By a table for each kernel, over the lengths that it has and all cosines, read linearly.
    """

    def lost(length: jax.Array, rho: jax.Array) -> jax.Array:
        nothing = jnp.zeros_like(length)
        return ratio(act.risk(length, act.best_length(length, rho), rho), act.risk(length, nothing, nothing))

    def of_one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        size, cosine = pair
        present = size > 0
        low = jnp.log(jnp.min(jnp.where(present, size, jnp.inf), initial=jnp.inf))
        low = jnp.where(jnp.isfinite(low), low, 0)
        width = jnp.maximum(jnp.log(jnp.max(size, initial=1e-30)) - low, 1e-6)
        grid = jnp.exp(low + width * jnp.arange(_LENGTHS) / (_LENGTHS - 1)).astype(size.dtype)
        rho = jnp.arange(_COSINES, dtype=size.dtype) / (_COSINES - 1)
        table = jax.lax.map(lambda length: lost(length, rho), grid)
        place = (jnp.log(jnp.where(present, size, 1)) - low) / width * (_LENGTHS - 1)
        places = [jnp.broadcast_to(place, cosine.shape), cosine * (_COSINES - 1)]
        return map_coordinates(table, places, order=1, mode="nearest")

    return jax.lax.map(of_one, (size, cosine))
