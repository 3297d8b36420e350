"""The best low-rank approximation of a kernel: in Frobenius norm (spectral), or of the function that its layer computes.

A layer computes sigma(x W) with W `[n, m]`, one column per output.  The function risk of an approximation Y under Gaussian
inputs is

    R(Y) = E |sigma(x W) - sigma(x Y)|^2,        x ~ N(0, I_n),

and the nonlinear kernel projection looks for a rank-r Y with a small risk (arXiv 2202.00834;
docs/mathematics.md, sections 3 and 4).

Where several columns feed one output, as in the spatial scheme for convolutions, `group` says how many: column j belongs to
output j % (m // group), and lengths and angles are those of an output's columns taken together.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowrank_jax.projection import activations, batched, linalg, subspaces
from lowrank_jax.projection.activations import Activation, ActivationLike
from lowrank_jax.projection.batched import measure
from lowrank_jax.projection.linalg import Pair, grouped, lengths, ratio, wide
from lowrank_jax.projection.stack import Stack
from lowrank_jax.projection.subspaces import SUBSPACES
from lowrank_jax.text import did_you_mean


def spectral(w: jax.Array, rank: int) -> Pair:
    """Factors by truncated SVD, split evenly: the closest rank-r matrix in Frobenius norm (Khodak et al., ICLR 2021).

    In float32 |W - UV| is within a per mille of the least possible, or a few times 1e-6 |W| where that is less; for float64 it
    is 1e-14 |W|.  Kernels of any size that float32 holds are served alike, but for elements below 1e-38.  Derivatives are NaN
    or infinite where singular values coincide (docs/mathematics.md, sections 2 and 3.2).

    Args:
      w: `[n, m]`.
      rank: from 1 to min(n, m).

    Returns:
      u `[n, rank]` and v `[rank, m]` in the dtype of w, with UᵀU = VVᵀ.

    Raises:
      ValueError: w is not a matrix of real, finite numbers, or the rank is out of range.
    """
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    return _spectral(w, linalg.gram_eigenvectors(w, rank), rank)


@functools.partial(jax.jit, static_argnames="rank")
def _spectral(w: jax.Array, vectors: jax.Array, rank: int) -> Pair:
    return _on_leading(w, vectors, rank, activations.get("identity"), False, 1)


def spectral_stacks(stacks: Sequence[Stack]) -> list[Pair]:
    """`spectral` of many kernels at once: for every stack u `[k, n, rank]` and v `[k, rank, m]`."""
    # For the identity, the length after projection is already the best one.
    return batched.project([dataclasses.replace(stack, activation="identity", group=1) for stack in stacks])


def kernel_projection(
    w: jax.Array,
    rank: int,
    *,
    activation: ActivationLike = "relu",
    subspace: str = "top",
    normalized: bool = False,
    group: int = 1,
) -> Pair:
    """Factors by nonlinear kernel projection: the columns of least function risk within a rank-r subspace.

    Args:
      w: `[n, m]`.
      rank: from 1 to min(n, m).
      activation: what follows the kernel: a name in `activations.ACTIVATIONS`, or any elementwise JAX function.
      subspace: `top`, the leading left singular vectors; `search`, the best subset of them; `refine`, the best subspace that
        monotone descent from there finds.  Derivatives with respect to w treat the subspace of the latter two as fixed; those
        of `top` are NaN where singular values coincide, like those of `jnp.linalg.eigh`.
      normalized: a normalisation layer follows: lengths are kept, |y_j| = |w_j|, and `search` and `refine` compare
        subspaces by directions alone.
      group: columns per output.

    Returns:
      u `[n, rank]` and v `[rank, m]` in the dtype of w, balanced: UᵀU = VVᵀ.

    Raises:
      ValueError: w is not a matrix of real, finite numbers, the rank is out of range, a name is unknown, or group does not
        divide m.  (Under a transformation values are unknown: NaN stays NaN.)
    """
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    linalg.check_group(w, group)
    if subspace not in SUBSPACES:
        raise ValueError(f"unknown subspace {subspace!r}{did_you_mean(subspace, SUBSPACES)}")
    return _kernel_projection(
        w, linalg.gram_eigenvectors(w, rank), rank, activations.get(activation), subspace, normalized, group
    )


@functools.partial(jax.jit, static_argnames=("rank", "act", "subspace", "normalized", "group"))
@linalg.highest_precision
def _kernel_projection(
    w: jax.Array, vectors: jax.Array, rank: int, act: Activation, subspace: str, normalized: bool, group: int
) -> Pair:
    if subspace == "top":
        return _on_leading(w, vectors, rank, act, normalized, group)
    return _on_subspace(w, _searched(w, vectors, rank, subspace, act, normalized, group), act, normalized, group)


def _on_leading(w: jax.Array, vectors: jax.Array, rank: int, act: Activation, normalized: bool, group: int) -> Pair:
    stack = Stack(None, w[None], rank, act, group)
    [(u, v)] = batched.project([stack], normalized=normalized, vectors=vectors[None])
    return u[0], v[0]


def on_subspace(
    w: jax.Array, q: jax.Array, *, activation: ActivationLike = "relu", normalized: bool = False, group: int = 1
) -> Pair:
    """The best approximation whose columns lie in a given subspace.

    Every output is projected and rescaled to the length of least risk: |w_j| h(rho_j) for ReLU, where rho_j is the cosine of
    the angle between w_j and the subspace (docs/mathematics.md, sections 3.1 and 4).  A zero output stays zero.  An output
    orthogonal to the subspace has no direction in it: it gets the first axis, which is as good as any.

    Args:
      w: `[n, m]`.
      q: `[n, rank]`, orthonormal columns.
      activation, normalized, group: as in `kernel_projection`.

    Returns:
      u `[n, rank]` and v `[rank, m]` in the dtype of w, balanced: UᵀU = VVᵀ.

    Raises:
      ValueError: as in `kernel_projection`.
    """
    linalg.check_matrix(w)
    linalg.check_group(w, group)
    linalg.check_matrix(q)
    if len(q) != len(w):
        raise ValueError(f"w {list(w.shape)} and q {list(q.shape)} must have the same number of rows")
    return _on_subspace(w, q, activations.get(activation), normalized, group)


@functools.partial(jax.jit, static_argnames=("act", "normalized", "group"))
@linalg.highest_precision
def _on_subspace(w: jax.Array, q: jax.Array, act: Activation, normalized: bool, group: int) -> Pair:
    [part] = batched.padded_stacks([Stack(None, w[None], q.shape[1], act, group)])
    [coordinates] = batched.at_best_lengths([part], [(q.T @ part.w[0])[None]], normalized)
    u, v = linalg.balance(q, coordinates[0])
    [(u, v)] = part.unpadded(u[None], v[None]).values()
    return u[0], v[0]


def _searched(
    w: jax.Array, vectors: jax.Array, rank: int, name: str, act: Activation, normalized: bool, group: int
) -> jax.Array:
    """Orthonormal Q `[n, rank]`, by `search` or `refine`."""
    unit = linalg.unit(w)
    relative = jax.lax.stop_gradient(w.astype(wide(w.dtype)) / unit)
    q = linalg.leading_directions(relative, jax.lax.stop_gradient(vectors), min(w.shape))
    coordinates = q.T @ relative
    length = lengths(coordinates, group)
    loss = _loss(act, length * measure(act, unit), normalized)
    chosen = subspaces.search(jnp.sum(grouped(coordinates**2, group), axis=1), length, rank, loss)
    if name == "search":
        return q[:, chosen]
    start = jnp.zeros((len(coordinates), rank), coordinates.dtype).at[chosen, jnp.arange(rank)].set(1)
    return q @ subspaces.refine(coordinates, start, lambda c: jnp.minimum(ratio(lengths(c, group), length), 1), loss)


def _loss(act: Activation, length: jax.Array, normalized: bool) -> subspaces.Loss:
    """The risk of every output at its best length as a function of its cosine; before a normalisation, lengths are one."""

    def loss(rho: jax.Array) -> jax.Array:
        if normalized:
            return act.risk(jnp.ones_like(rho), jnp.ones_like(rho), rho) * (length > 0)
        return act.risk(length, act.best_length(length, rho), rho)

    cheap = isinstance(act, activations.Homogeneous)
    return loss if cheap else subspaces.tabulated(loss, len(length), length.dtype)


def risk(w: jax.Array, y: jax.Array, *, activation: ActivationLike = "relu", group: int = 1) -> jax.Array:
    """R(Y) = E |sigma(x W) - sigma(x Y)|² over x ~ N(0, I), without sampling (docs/mathematics.md, sections 3 and 4).

    Args:
      w: the kernel, `[n, m]`.
      y: its approximation, `[n, m]`; for factors, their product.
      activation: what follows the kernel: a name in `activations.ACTIVATIONS`, or any elementwise JAX function.
      group: columns per output.

    Returns:
      A scalar in float32 or better.

    Raises:
      ValueError: the shapes differ, are not matrices of real, finite numbers, or the activation is unknown.
    """
    _check_same(w, y, group)
    total, unit = _risk(w, y, activations.get(activation), group)
    return total * unit * unit


def relative_risk(w: jax.Array, y: jax.Array, *, activation: ActivationLike = "relu", group: int = 1) -> jax.Array:
    """R(Y) / R(0): 0 if Y computes the same function as W, 1 if it loses all of it.  Arguments and errors as in `risk`.

    Also works for kernels so large or small that the risk itself overflows or underflows; 0 for a zero kernel.
    """
    _check_same(w, y, group)
    act = activations.get(activation)
    (lost, unit), (whole, other) = _risk(w, y, act, group), _risk(w, 0 * w, act, group)
    return ratio(lost, whole) * (unit / other) * (unit / other)


def _check_same(w: jax.Array, y: jax.Array, group: int) -> None:
    linalg.check_matrix(w)
    linalg.check_matrix(y)
    linalg.check_group(w, group)
    if w.shape != y.shape:
        raise ValueError(f"w {list(w.shape)} and y {list(y.shape)} must have the same shape")


@functools.partial(jax.jit, static_argnames=("act", "group"))
@linalg.highest_precision
def _risk(w: jax.Array, y: jax.Array, act: Activation, group: int) -> tuple[jax.Array, jax.Array]:
    """The risk in units of `unit`², and `unit`."""
    dtype = wide(jnp.result_type(w, y))
    unit = linalg.unit(w.astype(dtype), y.astype(dtype))
    w, y = w.astype(dtype) / unit, y.astype(dtype) / unit
    a, b = lengths(w, group), lengths(y, group)
    rho = jnp.clip(ratio(jnp.sum(grouped(w * y, group), axis=(0, 1)), a * b), -1, 1)
    scale = measure(act, unit)

    return jnp.sum(act.risk(a * scale, b * scale, rho)), unit / scale
