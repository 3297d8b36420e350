"""Linear algebra for projections: in float32 or better, at the highest matmul precision, safe at zero."""

import functools
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.linalg import solve_triangular

from lowrank_jax.projection.padding import in_few_shapes

Pair = tuple[jax.Array, jax.Array]  # u [n, r] and v [r, m]


def highest_precision(fn: Any) -> Any:
    """Runs a function at the highest matmul precision: on TPU, float32 products use bfloat16 by default."""
    return functools.wraps(fn)(jax.default_matmul_precision("highest")(fn))


def wide(dtype: Any) -> Any:
    """The dtype to compute in, at least float32: there are no 16-bit decompositions."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.jit
@highest_precision
def gram_eigenvectors(w: jax.Array) -> jax.Array:
    """The eigenvectors of the smaller Gram matrix of W, `[p, p]`, p = min(n, m), by decreasing eigenvalue.

    A separate program: where singular values repeat, the vectors depend on rounding, and every caller must get the same ones.
    """
    w = jax.lax.optimization_barrier(w.astype(wide(w.dtype)) / unit(w))
    return eigenvectors([jax.lax.optimization_barrier(gram(w[None]))])[0][0]


def gram(w: jax.Array) -> jax.Array:
    """The smaller Gram matrix of every W, `[k, n, m] -> [k, p, p]`."""
    return w @ w.mT if w.shape[1] <= w.shape[2] else w.mT @ w


def eigenvectors(grams: Sequence[jax.Array], sizes: Sequence[np.ndarray] | None = None) -> list[jax.Array]:
    """The eigenvectors of Gram matrices, stacks `[k, p, p]` of any sizes, by decreasing eigenvalue; those of padding come last.

    Args:
      grams, sizes: as in `padding.in_few_shapes`.
    """
    return in_few_shapes(_eigenvectors, grams, sizes=sizes)


def _eigenvectors(size: jax.Array, gram: jax.Array) -> jax.Array:
    # Padding gets a negative eigenvalue of average size: below all rounding, so it sorts last, yet not large by comparison.
    mean = jnp.trace(gram) / len(gram)
    padding = jnp.arange(len(gram)) >= size
    return _eigh(gram - jnp.diag(jnp.where(padding, jnp.where(mean > 0, mean, 1), 0)))[1][:, ::-1]


def _eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`jnp.linalg.eigh`, except on a TPU.

    There, matrices of more than 256 rows are split by polar decompositions, which take the compiler 50 to 120 seconds per size;
    Jacobi rotations, the default for smaller matrices, take two seconds at any size.
    """

    def jacobi(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors, values = jax.lax.linalg.eigh(gram, implementation=jax.lax.linalg.EighImplementation.JACOBI)
        return values, vectors

    return jax.lax.platform_dependent(gram, tpu=jacobi, default=lambda gram: tuple(jnp.linalg.eigh(gram)))


def orthonormalizers(grams: Sequence[jax.Array]) -> list[Pair]:
    """From YᵀY, stacks `[k, r, r]` of any sizes: T, with orthonormal columns in YT, and its inverse; both upper triangular.

    By a Cholesky decomposition of the normalised columns.  Columns that are rounding next to the others span nothing and become
    zero; those that nearly depend on the others come out shorter than one.
    """

    def one(_: jax.Array, gram: jax.Array) -> Pair:
        eps = jnp.finfo(gram.dtype).eps
        squares = jnp.diagonal(gram)
        spans = squares > (16 * eps) ** 2 * jnp.sum(squares)
        length = jnp.sqrt(jnp.where(spans, squares, 1))
        eye = jnp.eye(len(gram), dtype=gram.dtype)
        cosines = jnp.where(spans & spans[:, None], gram / length / length[:, None], eye)
        shift = eps * len(gram)  # larger than the rounding of the decomposition, which must not fail
        lower = jnp.linalg.cholesky((cosines + shift * eye) / (1 + shift))
        basis = (solve_triangular(lower, eye, lower=True) / length).T
        return jnp.where(spans, basis, 0), lower.T * length

    return in_few_shapes(one, grams)


def leading_directions(w: jax.Array, vectors: jax.Array, rank: int) -> jax.Array:
    """The leading left singular vectors, `[n, rank]`, orthonormal.

    From `gram_eigenvectors`, in a third of the time of an SVD.  The Gram matrix squares the singular values, so float32 mixes
    directions whose singular values are below 1e-3 of the largest.  Each of them holds less than a millionth of |W|², and
    nothing computed from the basis uses eigenvalues.
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
    """The Q of a QR decomposition `[n, r]`, with signs such that R has a positive diagonal, so that it is close to `basis`."""
    q, r = jnp.linalg.qr(basis)
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(basis.dtype)


def balance(q: jax.Array, c: jax.Array) -> Pair:
    """QC, with orthonormal Q `[n, r]` and any C `[r, m]`, as factors of equal Gram matrices; O(r² m)."""
    [(turn, v)] = balancers([c[None]], [jnp.eye(len(c), dtype=c.dtype)[None]])
    return q @ turn[0], v[0]


def balancers(
    coordinates: Sequence[jax.Array], bases: Sequence[jax.Array], ranks: Sequence[np.ndarray] | None = None
) -> list[Pair]:
    """For stacks of B `[k, r, r]` and C `[k, r, m]` of any sizes: T `[k, r, r]` and V `[k, r, m]`, so that TV = BC.

    T is B P √S and V is √S⁻¹ PᵀC with the singular vectors P and values S of C.  So if YB is orthonormal, YT and V are factors
    of equal Gram matrices, and their product is YBC to rounding.  P comes from the Gram matrix of C, which resolves singular
    values down to 1e-3 of the largest; a second Gram matrix, of the rows below 1e-2, resolves the rest.

    Args:
      coordinates, bases: C and B.
      ranks: where matrices are padded with zero rows, the number of rows without padding: `[k]` for every stack.
    """
    first = eigenvectors([c @ c.mT for c in coordinates], ranks)
    rows = [p.mT @ c for p, c in zip(first, coordinates, strict=True)]

    def second(rank: jax.Array, gram: jax.Array, p: jax.Array, basis: jax.Array) -> Pair:
        tilt, rest = _small_rows(gram)
        turn = tilt @ _eigenvectors(rank, rest)
        return turn, basis @ (p @ turn)

    turns = in_few_shapes(second, [part @ part.mT for part in rows], first, bases, sizes=ranks)
    balanced = []
    for part, (turn, basis) in zip(rows, turns, strict=True):
        part = turn.mT @ part
        half = root(lengths(part.mT, 1))
        balanced.append((basis * half[:, None], ratio(part, half[..., None])))
    return balanced


_SMALL = 1e-2


def _small_rows(gram: jax.Array) -> Pair:
    """The second step of `balancers`, from the Gram matrix `[r, r]` of the rows PᵀC after the first one.

    These are orthogonal up to rounding of the largest row, which may be larger than the small rows.

    Returns:
      A rotation `[r, r]`, by angles of rounding, that makes small rows orthogonal to large ones; and the Gram matrix of the
      small rows after it, with values above all its eigenvalues, in order, in the places of the large ones.
    """
    squares, r = jnp.diagonal(gram), len(gram)
    large = squares > _SMALL**2 * jnp.max(squares)
    angle = jnp.where(large[:, None] & ~large, ratio(gram, squares[:, None]), 0)
    tilt = jnp.eye(r, dtype=gram.dtype) - angle + angle.T
    small = jnp.where(large[:, None] | large, 0, tilt.T @ gram @ tilt)
    bound = jax.lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(small), axis=1)))
    places = jnp.where(large, jnp.where(bound > 0, bound, 1) * (2 - jnp.arange(r) / r), 0)
    return tilt, small + jnp.diag(places.astype(gram.dtype))


def rebalance(us: Sequence[jax.Array], vs: Sequence[jax.Array]) -> list[Pair]:
    """Factors with the same products and equal Gram matrices; stacks `[k, n, r]` and `[k, r, m]` of any sizes."""
    sizes = [(units(u), units(v)) for u, v in zip(us, vs, strict=True)]
    us, vs = ([part / unit[i] for part, unit in zip(parts, sizes, strict=True)] for i, parts in enumerate((us, vs)))
    # All columns of U get the same length: a short one may have a long row of V.
    columns = [lengths(u, 1)[:, None] for u in us]
    us = [ratio(u, column) for u, column in zip(us, columns, strict=True)]
    vs = [v * column.mT for v, column in zip(vs, columns, strict=True)]
    bases = orthonormalizers([u.mT @ u for u in us])
    turns = balancers([back @ v for (_, back), v in zip(bases, vs, strict=True)], [basis for basis, _ in bases])
    scales = [jnp.sqrt(a) * jnp.sqrt(b) for a, b in sizes]
    return [(scale * (u @ turn), scale * v) for u, (turn, v), scale in zip(us, turns, scales, strict=True)]


def unit_columns(w: jax.Array) -> jax.Array:
    """The columns of W `[n, m]` scaled to length one; zero stays zero."""
    length = jnp.linalg.norm(w, axis=0)
    return w / jnp.where(length > 0, length, 1)


@functools.partial(jax.jit, static_argnames="slack")
@highest_precision
def solve_gram(gram: jax.Array, right: jax.Array, slack: float = 1.0) -> jax.Array:
    """G⁻¹ B for a Gram matrix `[r, r]` that may be numerically singular, with a ridge of `slack` times the trace's rounding."""
    ridge = slack * jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    return jax.scipy.linalg.solve(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype), right, assume_a="pos")


def units(stack: jax.Array) -> jax.Array:
    """`[k, 1, 1]`, the unit of every matrix."""
    return jax.vmap(unit)(stack)[:, None, None]


RIDGE = 0.01  # of every input's own moment: less is rounding or chance in a moment estimated from a few batches


def square_root(moment: jax.Array) -> jax.Array:
    """R `[n, n]`, upper triangular, with RᵀR = S + RIDGE · diag(s) for a second moment S `[n, n]`.

    s is the diagonal of S; where that is zero, or rounding next to the largest, the geometric mean of the others.  Without the
    ridge, the factors could do anything in directions in which no captured input points (docs/mathematics.md, section 8).

    Returns:
      In the dtype of S; NaN if S is not positive semidefinite.
    """
    squares = jnp.diagonal(moment)
    largest = jnp.max(jnp.abs(squares))
    live = ~(jnp.abs(squares) <= jnp.finfo(moment.dtype).eps ** 2 * largest)  # NaN is live, and stays
    logs = jnp.where(live, jnp.log(jnp.where(live, squares, 1)), 0)
    typical = jnp.exp(jnp.sum(logs) / jnp.maximum(jnp.sum(live), 1))  # 1 where all are zero: all kernels are equally good
    deviation = jnp.sqrt(jnp.where(live, squares, RIDGE * typical))
    # Scaled to a diagonal of one, so that neither a large input nor a small one is lost in the other's rounding.
    cosines = jnp.where(live & live[:, None], moment / deviation / deviation[:, None], 0)
    ridge = jnp.where(live, RIDGE, 1)
    return jnp.linalg.cholesky(cosines + jnp.diag(ridge.astype(moment.dtype))).T * deviation


def unit(*matrices: jax.Array) -> jax.Array:
    """The largest magnitude, to measure matrices in: squares of very large or small elements leave the range of float32."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(matrix)) for matrix in matrices])).astype(wide(matrices[0].dtype))
    return jax.lax.stop_gradient(jnp.where(largest == 0, 1, largest))


def grouped(w: jax.Array, group: int) -> jax.Array:
    """`[..., n, group * outputs] -> [..., n, group, outputs]`."""
    return w.reshape(*w.shape[:-1], group, -1)


def lengths(w: jax.Array, group: int) -> jax.Array:
    """The Euclidean length of every output's columns, `[..., outputs]`; its gradient at zero is zero."""
    squares = jnp.sum(grouped(w, group) ** 2, axis=(-3, -2))
    return root(squares)


def root(squares: jax.Array) -> jax.Array:
    """The square root; its gradient at zero is zero."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def check_matrix(w: Any) -> None:
    """Raises ValueError unless it is a non-empty matrix of real, finite numbers; traced values are not checked."""
    if not hasattr(w, "dtype"):
        raise ValueError(f"expected a matrix [n, m], got a {type(w).__name__}")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"expected a matrix [n, m], got shape {list(w.shape)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"expected a matrix of real numbers, got dtype {w.dtype}")
    if not known_finite(w):
        raise ValueError(f"the {w.shape[0]}x{w.shape[1]} matrix contains non-finite values")


def known_finite(array: Any) -> bool:
    """False if elements are NaN or infinite; True if they are finite, or traced and so unknown."""
    if isinstance(array, Tracer):
        return True
    with jax.ensure_compile_time_eval():  # constants are known even under an outer jit
        return bool(jnp.isfinite(array).all())


def is_count(value: Any) -> bool:
    """Whether it is a positive whole number."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def check_rank(w: jax.Array, rank: int) -> None:
    """Raises ValueError unless the rank is from 1 to min(n, m)."""
    n, m = w.shape
    if not is_count(rank) or rank > min(n, m):
        raise ValueError(f"rank {rank} of a {n}x{m} matrix: must be a whole number from 1 to {min(n, m)}")


def check_group(w: jax.Array, group: int) -> None:
    """Raises ValueError unless the columns can be divided into groups of that size."""
    if not is_count(group) or w.shape[1] % group:
        raise ValueError(f"group {group} does not divide the {w.shape[1]} columns")
