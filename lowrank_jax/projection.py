"""The best low-rank stand-in for a kernel: in Frobenius norm (spectral) or for the function that it computes.

A layer computes sigma(x W) with W `[n, m]`, one column an output.  The function risk of a stand-in Y under Gaussian inputs is

    R(Y) = E |sigma(x W) - sigma(x Y)|^2,        x ~ N(0, I_n),

and the nonlinear kernel projection looks for the rank-r Y that makes it small (arXiv 2202.00834;
docs/mathematics.md, section 3).

Where several columns feed one output, as in the spatial scheme for convolutions, `group` says how many: column j belongs to
output j % (m // group), and lengths and angles are those of an output's columns taken together.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import activations
from lowrank_jax.paths import did_you_mean

SUBSPACES = ("top",)


class _Thin(NamedTuple):
    """A truncated singular value decomposition of W."""

    q: jax.Array  # [n, r], orthonormal columns
    s: jax.Array  # [r], descending
    bt: jax.Array  # [r, m], orthonormal rows


def _highest_precision(fn: Any) -> Any:
    """On TPU a float32 product is by default a bfloat16 one; a projection needs all of its digits."""
    return functools.wraps(fn)(jax.default_matmul_precision("highest")(fn))


@_highest_precision
def spectral(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The truncated SVD, split evenly: the closest rank-r matrix in Frobenius norm (Khodak et al., ICLR 2021).

    Args:
      w: `[n, m]`.
      rank: from 1 to min(n, m).

    Returns:
      u `[n, rank]` and v `[rank, m]` in the dtype of w, with UᵀU = VVᵀ.

    Raises:
      ValueError: w is not a matrix of real numbers, or the rank is out of range.
    """
    _check(w, rank)
    thin = _svd(w, rank)
    root = jnp.sqrt(thin.s)
    return (thin.q * root).astype(w.dtype), (root[:, None] * thin.bt).astype(w.dtype)


@_highest_precision
def kernel_projection(
    w: jax.Array, rank: int, *, activation: str = "relu", subspace: str = "top", group: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The nonlinear kernel projection: columns of least function risk within a rank-r subspace.

    Every output is projected on the subspace and given the length |w_j| h(rho_j), where rho_j is the cosine of the angle
    between w_j and the subspace (docs/mathematics.md, section 3.1).  A zero output stays zero.

    Args:
      w: `[n, m]`.
      rank: from 1 to min(n, m).
      activation: what follows the kernel, a name in `activations.ACTIVATIONS`.
      subspace: `top`, the leading left singular vectors.
      group: columns an output.

    Returns:
      u `[n, rank]` and v `[rank, m]` in the dtype of w, balanced: UᵀU = VVᵀ.

    Raises:
      ValueError: w is not a matrix of real numbers, the rank is out of range, a name is unknown, or group does not divide m.
    """
    _check(w, rank, group)
    if subspace not in SUBSPACES:
        raise ValueError(f"unknown subspace {subspace!r}{did_you_mean(subspace, SUBSPACES)}")
    act = activations.get(activation)
    unit = _unit(w)
    thin = _svd(w / unit, rank)
    c = thin.s[:, None] * thin.bt  # coordinates of the projected columns, [r, m]
    length = _lengths(w.astype(c.dtype) / unit, group)
    projected = _lengths(c, group)
    rho = _ratio(projected, length)
    scale = _ratio(length * act.h(rho), projected)
    return _balance(thin.q, c * jnp.tile(scale, group), unit, w.dtype)


@_highest_precision
def risk(w: jax.Array, y: jax.Array, *, activation: str = "relu", group: int = 1) -> jax.Array:
    """R(Y) = E |sigma(x W) - sigma(x Y)|² over x ~ N(0, I), exactly (docs/mathematics.md, section 3).

    Args:
      w: the kernel, `[n, m]`.
      y: its stand-in, `[n, m]`; for factors, their product.
      activation: what follows the kernel.
      group: columns an output.

    Returns:
      A scalar in float32 or better.  Divide by `risk(w, 0 * w)` for the relative risk.

    Raises:
      ValueError: the shapes differ, are not matrices, or the activation is unknown.
    """
    _check(w, 1, group)
    if w.shape != y.shape:
        raise ValueError(f"w {list(w.shape)} and y {list(y.shape)} must have one shape")
    act = activations.get(activation)
    wide = _wide(jnp.result_type(w, y))
    unit = _unit(w.astype(wide), y.astype(wide))
    w, y = w.astype(wide) / unit, y.astype(wide) / unit
    a, b = _lengths(w, group), _lengths(y, group)
    inner = jnp.sum(_grouped(w * y, group), axis=(0, 1))
    h = act.h(_ratio(inner, a * b))
    return act.gain * jnp.sum(a**2 + b**2 - 2 * a * b * h) * unit * unit


def _svd(w: jax.Array, rank: int) -> _Thin:
    q, s, bt = jnp.linalg.svd(w.astype(_wide(w.dtype)), full_matrices=False)
    return _Thin(q[:, :rank], s[:rank], bt[:rank])


def _balance(q: jax.Array, c: jax.Array, unit: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Y = unit * Q C, with orthonormal Q `[n, r]` and C `[r, m]`, as factors of equal Gram matrices; O(r² m)."""
    p, s, bt = jnp.linalg.svd(c, full_matrices=False)
    root = jnp.sqrt(s) * jnp.sqrt(unit)
    return (q @ (p * root)).astype(dtype), (root[:, None] * bt).astype(dtype)


def _unit(*matrices: jax.Array) -> jax.Array:
    """The largest magnitude, in which to measure: squares of very large or small elements leave float32's range."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(matrix)) for matrix in matrices])).astype(_wide(matrices[0].dtype))
    return jax.lax.stop_gradient(jnp.where(largest == 0, 1, largest))


def _grouped(w: jax.Array, group: int) -> jax.Array:
    """`[n, group * outputs] -> [n, group, outputs]`."""
    return w.reshape(w.shape[0], group, -1)


def _lengths(w: jax.Array, group: int) -> jax.Array:
    """The Euclidean length of every output's columns, `[outputs]`; its gradient at zero is zero."""
    squares = jnp.sum(_grouped(w, group) ** 2, axis=(0, 1))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _wide(dtype: Any) -> Any:
    """The dtype to compute in: 16-bit decompositions do not exist, and would not be worth having."""
    return jnp.promote_types(dtype, jnp.float32)


def _check(w: jax.Array, rank: int, group: int = 1) -> None:
    if not hasattr(w, "dtype"):
        raise ValueError(f"expected a matrix [n, m], got a {type(w).__name__}")
    if w.ndim != 2:
        raise ValueError(f"expected a matrix [n, m], got shape {list(w.shape)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"expected a matrix of real numbers, got dtype {w.dtype}")
    n, m = w.shape
    if type(rank) is not int or not 1 <= rank <= min(n, m):
        raise ValueError(f"rank {rank} of a {n}x{m} matrix: must be a whole number from 1 to {min(n, m)}")
    if group < 1 or m % group:
        raise ValueError(f"group {group} does not divide the {m} columns")
