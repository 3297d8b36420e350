"""The linear algebra that projections share: float32 or better, at the highest precision, safe at zero."""

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

Pair = tuple[jax.Array, jax.Array]  # u [n, r] and v [r, m]


def highest_precision(fn: Any) -> Any:
    """On TPU a float32 product is by default a bfloat16 one; a projection needs all of its digits."""
    return functools.wraps(fn)(jax.default_matmul_precision("highest")(fn))


def wide(dtype: Any) -> Any:
    """The dtype to compute in: 16-bit decompositions do not exist, and would not be worth having."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.jit
@highest_precision
def gram_eigenvectors(w: jax.Array) -> jax.Array:
    """The eigenvectors of the smaller Gram matrix of W, `[p, p]`, p = min(n, m), by falling eigenvalue.

    A program of its own: where singular values repeat, rounding decides on the vectors, and all that asks has to get the same.
    """
    w = jax.lax.optimization_barrier(w.astype(wide(w.dtype)) / unit(w))
    gram = jax.lax.optimization_barrier(w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w)
    return jnp.linalg.eigh(gram)[1][:, ::-1]


def leading_directions(w: jax.Array, vectors: jax.Array, rank: int) -> jax.Array:
    """The leading left singular vectors, `[n, rank]`: orthonormal, and spanning what W has most of.

    From `gram_eigenvectors`, in a third of the time of a singular value decomposition.  The Gram matrix squares the singular
    values, so float32 mixes directions of less than 1e-3 of the largest one with others of their like.  Each of them holds
    less than a millionth of |W|², and what is computed from the basis uses no eigenvalues.
    """
    vectors = vectors[:, :rank]
    return vectors if w.shape[0] <= w.shape[1] else orthonormal(w @ vectors)


def truncated_svd(w: jax.Array, vectors: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular vectors and values of W: A `[n, rank]`, s `[rank]`, Bᵀ `[rank, m]`; from `gram_eigenvectors`."""
    scale = unit(w)
    relative = w.astype(wide(w.dtype)) / scale
    q = leading_directions(relative, vectors, rank)
    p, s, bt = jnp.linalg.svd(q.T @ relative, full_matrices=False)
    return q @ p, s * scale, bt


def orthonormal(basis: jax.Array) -> jax.Array:
    """The Q of a QR decomposition `[n, r]`, with the signs that make R's diagonal positive: close to `basis` where that is."""
    q, r = jnp.linalg.qr(basis)
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(basis.dtype)


def balance(q: jax.Array, c: jax.Array) -> Pair:
    """QC, with orthonormal Q `[n, r]` and any C `[r, m]`, as factors of equal Gram matrices; O(r² m)."""
    p, s, bt = jnp.linalg.svd(c, full_matrices=False)
    root = jnp.sqrt(s)
    return q @ (p * root), root[:, None] * bt


def rebalance(u: jax.Array, v: jax.Array) -> Pair:
    """The same product, from factors of equal Gram matrices; O((n + m) r²)."""
    q, r = jnp.linalg.qr(u)
    return balance(q, r @ v)


RIDGE = 0.01  # of the mean eigenvalue: less is rounding and chance, of a moment taken from a few batches


def square_root(moment: jax.Array) -> jax.Array:
    """R `[n, n]`, upper triangular, with RᵀR = S + RIDGE · tr(S)/n · I for a second moment S `[n, n]`.

    A kernel that is factored for S alone may do anything in directions in which no captured input points.
    """
    mean = jnp.trace(moment) / len(moment)
    ridge = jnp.where(mean > 0, RIDGE * mean, 1)  # an input that is always zero: all kernels are as good
    return jnp.linalg.cholesky(moment + ridge * jnp.eye(len(moment), dtype=moment.dtype)).T


def unit(*matrices: jax.Array) -> jax.Array:
    """The largest magnitude, in which to measure: squares of very large or small elements leave float32's range."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(matrix)) for matrix in matrices])).astype(wide(matrices[0].dtype))
    return jax.lax.stop_gradient(jnp.where(largest == 0, 1, largest))


def grouped(w: jax.Array, group: int) -> jax.Array:
    """`[n, group * outputs] -> [n, group, outputs]`."""
    return w.reshape(w.shape[0], group, -1)


def lengths(w: jax.Array, group: int) -> jax.Array:
    """The Euclidean length of every output's columns, `[outputs]`; its gradient at zero is zero."""
    squares = jnp.sum(grouped(w, group) ** 2, axis=(0, 1))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def check_matrix(w: Any) -> None:
    """Raises ValueError if it is not a matrix of real, finite numbers, at least one; values are judged where they are known."""
    if not hasattr(w, "dtype"):
        raise ValueError(f"expected a matrix [n, m], got a {type(w).__name__}")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"expected a matrix [n, m], got shape {list(w.shape)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"expected a matrix of real numbers, got dtype {w.dtype}")
    if not known_finite(w):
        raise ValueError(f"the {w.shape[0]}x{w.shape[1]} matrix has elements that are not finite")


def known_finite(array: Any) -> bool:
    """False if elements are NaN or infinite; True also where values are not known, under a transformation."""
    if isinstance(array, Tracer):
        return True
    with jax.ensure_compile_time_eval():  # a constant under an outer jit is known all the same
        return bool(jnp.isfinite(array).all())


def check_rank(w: jax.Array, rank: int) -> None:
    """Raises ValueError if there is no factor pair of that rank."""
    n, m = w.shape
    if not isinstance(rank, numbers.Integral) or isinstance(rank, bool) or not 1 <= rank <= min(n, m):
        raise ValueError(f"rank {rank} of a {n}x{m} matrix: must be a whole number from 1 to {min(n, m)}")


def check_group(w: jax.Array, group: int) -> None:
    """Raises ValueError if the columns do not fall into groups of that size."""
    if not isinstance(group, numbers.Integral) or isinstance(group, bool) or group < 1 or w.shape[1] % group:
        raise ValueError(f"group {group} does not divide the {w.shape[1]} columns")
