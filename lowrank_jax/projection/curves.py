"""What a kernel's projection loses at every rank at once, from one decomposition.

In the leading left singular vectors an output j keeps c_j(r) = Σ_{i≤r} (σ_i B_ji)² of its squared length.  So the cosines of
all ranks are a cumulative sum, and each says what is lost of the output's function (docs/mathematics.md, section 12).
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from lowrank_jax.projection import activations, linalg
from lowrank_jax.projection.activations import Activation, ActivationLike
from lowrank_jax.projection.batched import PaddedStack, measure, padded_stacks
from lowrank_jax.projection.linalg import grouped, lengths, ratio, root
from lowrank_jax.projection.stack import Stack
from lowrank_jax.text import did_you_mean

# What a normalisation right behind makes the outputs' lengths: `each` has its own statistic, so that all become equal, or all
# have one `together`, and keep their proportions.
Normalization = Literal["each", "together"]

_LENGTHS, _COSINES = 17, 129  # of the table of a risk that takes a series


class _Outputs(NamedTuple):
    """What is known of the outputs of kernels, in each kernel's unit.

    Attributes:
      length: `[k, outputs]`.
      cosine: with the leading subspace of every rank, `[k, p, outputs]`.
    """

    length: jax.Array
    cosine: jax.Array


class Curves(NamedTuple):
    """By rank, from 1 to full rank, on the last axis.

    Attributes:
      risk: R(r) / R(0) of the kernel projection, falling to 0.
      correlation: the squared correlation of the outputs with those of the dense layer, rising to 1.  The outputs' means, which
        a bias holds, do not count.
      energy: the share of the squared singular values, rising to 1.
    """

    risk: jax.Array
    correlation: jax.Array
    energy: jax.Array


def curves(
    w: jax.Array, *, activation: ActivationLike = "relu", group: int = 1, normalized: Normalization | None = None
) -> Curves:
    """Of a kernel in its leading singular subspace at every rank.

    Args:
      w: `[n, m]`.
      activation, group: as in `kernel_projection`.
      normalized: the normalisation that follows: of `each` output by itself, which then counts as much as any other, or of
        all `together`, as in LayerNorm, whose mean square becomes 1; None for none.

    Returns:
      Arrays `[min(n, m)]`, float32 or better.

    Raises:
      ValueError: as in `kernel_projection`, or there is no such normalisation.
    """
    if normalized is not None and normalized not in get_args(Normalization):
        raise ValueError(f"unknown normalisation {normalized!r}{did_you_mean(str(normalized), get_args(Normalization))}")
    linalg.check_matrix(w)
    linalg.check_group(w, group)
    return _of_one(w, activations.get(activation), group, normalized)


@functools.partial(jax.jit, static_argnames=("act", "group", "normalized"))
def _of_one(w: jax.Array, act: Activation, group: int, normalized: Normalization | None) -> Curves:
    [found] = curves_of_stacks([Stack(None, w[None], 1, act, group)], [normalized])
    return Curves(*(curve[0] for curve in found))


def curves_of_stacks(stacks: Sequence[Stack], normalized: Sequence[Normalization | None]) -> list[Curves]:
    """`curves` of many kernels: arrays `[k, p]` for every stack, p = min(n, m) of its matrices; their ranks do not matter.

    Decompositions and products are compiled for few shapes, as in `batched.project`.
    """
    found: dict[int, Curves] = {}
    for part, outputs in zip(parts := padded_stacks(stacks), _outputs(parts), strict=True):
        kinds = np.repeat([normalized[i] or "" for i in part.bucket.members], part.bucket.counts)
        of_runs = [_curves(act, part, run, outputs, kinds) for act, run in part.runs()]
        whole = [part.bucket.split(jnp.concatenate(curve)) for curve in zip(*of_runs, strict=True)]
        for i, *of_one in zip(part.bucket.members, *whole, strict=True):
            found[i] = Curves(*(curve[:, : min(stacks[i].w.shape[1:])] for curve in of_one))
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


def _curves(act: Activation, part: PaddedStack, run: slice, outputs: _Outputs, normalized: np.ndarray) -> Curves:
    """`[k, p]` of the kernels in `run`, which are followed by one activation."""
    length, cosine = outputs.length[run], outputs.cosine[run]
    each, together = (jnp.asarray(normalized[run] == kind)[:, None] for kind in get_args(Normalization))
    present = (length > 0).astype(length.dtype)
    shared = root(ratio(jnp.sum(length**2, axis=1), jnp.sum(present, axis=1)))[:, None]
    size = jnp.where(each, present, jnp.where(together, ratio(length, shared), length * measure(act, part.unit[run, 0])))
    nothing = jnp.zeros_like(size)
    if isinstance(act, activations.Homogeneous):
        lost, kept = _shares(act, jnp.ones_like(size)[:, None], cosine)
    else:
        lost, kept = _tabulated(act, size, cosine)
    # Of a zero kernel nothing is lost.
    return Curves(
        _mean(lost, act.risk(size, nothing, nothing)),
        1 - _mean(1 - kept**2, act.risk(size, size, nothing)),
        1 - _mean(1 - cosine**2, length**2),
    )


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Over outputs: `[k, p, outputs]` and `[k, outputs]` to `[k, p]`."""
    return ratio(jnp.sum(values * weights[:, None], axis=-1), jnp.sum(weights, axis=-1)[:, None])


def _shares(act: Activation, length: jax.Array, rho: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of outputs at a cosine: the share of the risk that is left at the best length, and the correlation that is kept."""
    nothing = jnp.zeros_like(length)
    lost = ratio(act.risk(length, act.best_length(length, rho), rho), act.risk(length, nothing, nothing))
    return lost, 1 - ratio(act.risk(length, length, rho), act.risk(length, length, nothing))


def _tabulated(act: Activation, size: jax.Array, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_shares` of outputs of sizes `[k, outputs]` at cosines `[k, ranks, outputs]`.

    By tables for each kernel, over the lengths that it has and all cosines, read linearly.
    """

    def of_one(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        size, cosine = pair
        present = size > 0
        low = jnp.log(jnp.min(jnp.where(present, size, jnp.inf), initial=jnp.inf))
        low = jnp.where(jnp.isfinite(low), low, 0)
        width = jnp.maximum(jnp.log(jnp.max(size, initial=1e-30)) - low, 1e-6)
        grid = jnp.exp(low + width * jnp.arange(_LENGTHS) / (_LENGTHS - 1)).astype(size.dtype)
        rho = jnp.arange(_COSINES, dtype=size.dtype) / (_COSINES - 1)
        tables = jax.lax.map(lambda length: _shares(act, jnp.full_like(rho, length), rho), grid)
        place = (jnp.log(jnp.where(present, size, 1)) - low) / width * (_LENGTHS - 1)
        places = [jnp.broadcast_to(place, cosine.shape), cosine * (_COSINES - 1)]
        lost, kept = (map_coordinates(table, places, order=1, mode="nearest") for table in tables)
        return lost, kept

    return jax.lax.map(of_one, (size, cosine))
