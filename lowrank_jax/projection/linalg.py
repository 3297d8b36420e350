"""Linear algebra for projections: in float32 or better, at the highest matmul precision, safe at zero."""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
def gram_eigenvectors(w: jax.Array, rank: int) -> jax.Array:
    """The singular vectors of the smaller side of W `[n, m]`, as `singular_vectors` finds them: `[p, p]`, p = min(n, m).

    A separate program: where singular values repeat, the vectors depend on rounding, and every caller must get the same ones.
    """
    w = jax.lax.optimization_barrier(w.astype(wide(w.dtype)) / unit(w))
    return singular_vectors([w[None]], [jnp.full(1, min(w.shape))], [jnp.full(1, rank)])[0][0]


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
    return _decomposed(size, gram)[1]


def _decomposed(size: jax.Array, gram: jax.Array) -> Pair:
    """Eigenvalues `[p]`, decreasing, and eigenvectors `[p, p]`; rows of the Gram matrix from `size` on are padding."""
    # Padding gets a negative eigenvalue of average size: below all rounding, so it sorts last, yet not large by comparison.
    mean = jnp.trace(gram) / len(gram)
    padding = jnp.arange(len(gram)) >= size
    values, vectors = _eigh(gram - jnp.diag(jnp.where(padding, jnp.where(mean > 0, mean, 1), 0)))
    return values[::-1], vectors[:, ::-1]


def _eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`jnp.linalg.eigh`, except on a TPU.

    There, matrices of more than 256 rows are split by polar decompositions, which take the compiler 50 to 120 seconds per size;
    Jacobi rotations, the default for smaller matrices, take two seconds at any size.
    """

    def jacobi(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors, values = jax.lax.linalg.eigh(gram, implementation=jax.lax.linalg.EighImplementation.JACOBI)
        return values, vectors

    return jax.lax.platform_dependent(gram, tpu=jacobi, default=lambda gram: tuple(jnp.linalg.eigh(gram)))


_PASSES = 3


class _Passes(NamedTuple):
    """The state of `singular_vectors`, a list of stacks each."""

    number: jax.Array  # of passes so far
    open: list[jax.Array]  # matrices that need another pass, `[k]`
    vectors: list[jax.Array]  # `[k, p, p]`
    largest: list[jax.Array]  # the largest eigenvalue, `[k]`


@jax.custom_jvp
@highest_precision
def singular_vectors(ws: Sequence[jax.Array], sides: Sequence[jax.Array], ranks: Sequence[jax.Array]) -> list[jax.Array]:
    """The singular vectors of the smaller side of every W, by decreasing singular value; those of padding come last.

    They are the eigenvectors of the smaller Gram matrix, which resolves singular values down to √eps of the largest, σ.  Where
    the leading `rank` of them leave less than eps^¼ σ of W, a second pass decomposes the Gram matrix of W in that basis,
    without the directions above eps^¼ σ.  Where they leave less than √eps σ, a third pass does so without those above √eps σ.
    It resolves singular values down to eps σ, as a singular value decomposition does (docs/mathematics.md, section 3.2).

    Further passes run in a loop, and only for matrices that need them.  On a TPU the first pass runs in the loop too: there,
    every decomposition in the program takes long to compile.

    Derivatives are those of eigenvectors: NaN or infinite where singular values coincide.

    Args:
      ws: stacks `[k, n, m]` of any sizes, measured in `units`.
      sides: min(n, m) without padding, `[k]` for every stack.
      ranks: how many of the vectors count, `[k]` for every stack.

    Returns:
      `[k, p, p]` for every stack, p = min(n, m).
    """

    def advance(state: _Passes, first: bool | jax.Array) -> _Passes:
        small = _fourth_root(ws[0].dtype) ** state.number.astype(ws[0].dtype)
        # What needs no pass has no rows that are not padding, and is left alone.
        sizes = [jnp.where(open_, side, 0) for open_, side in zip(state.open, sides, strict=True)]
        # The first basis is that of the rows or columns themselves.  One product for all passes, to compile once as well.
        number = state.number + 1
        turned = _either(first, lambda ws, _: ws, lambda ws, vs: list(map(_rotated, ws, vs)), list(ws), state.vectors)
        turns, values = zip(
            *in_few_shapes(functools.partial(_settled, first, small), list(map(gram, turned)), sizes=sizes), strict=True
        )
        vectors = _either(
            first, lambda _, turns: turns, lambda vs, turns: list(map(jnp.matmul, vs, turns)), state.vectors, list(turns)
        )
        largest = [jnp.where(first, new[:, 0, 0], old) for new, old in zip(values, state.largest, strict=True)]
        bound = (small * _fourth_root(ws[0].dtype)) ** 2
        still = [
            open_ & (number < _PASSES) & (_left(new[..., 0], rank) < bound * top)
            for open_, new, rank, top in zip(state.open, values, ranks, largest, strict=True)
        ]
        return _Passes(number, still, vectors, largest)

    def unsettled(state: _Passes) -> jax.Array:
        return functools.reduce(jnp.logical_or, map(jnp.any, state.open))

    none = [jnp.zeros((len(w), min(w.shape[1:]), min(w.shape[1:])), w.dtype) for w in ws]
    everything, zeros = [jnp.ones(len(w), bool) for w in ws], [jnp.zeros(len(w), w.dtype) for w in ws]
    start = _Passes(jnp.asarray(0), everything, none, zeros)
    begun = jax.lax.platform_dependent(start, tpu=lambda start: start, default=lambda start: advance(start, True))
    return jax.lax.while_loop(unsettled, lambda state: advance(state, state.number == 0), begun).vectors


@singular_vectors.defjvp
@highest_precision
def _(primals: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    (ws, sides, ranks), (changes, *_) = primals, tangents
    vectors = singular_vectors(ws, sides, ranks)
    return vectors, [_vector_rates(*parts) for parts in zip(ws, changes, vectors, sides, strict=True)]


def _vector_rates(w: jax.Array, change: jax.Array, vectors: jax.Array, side: jax.Array) -> jax.Array:
    """The derivative of eigenvectors v_j of a Gram matrix G: Σ_i v_i (v_iᵀ dG v_j) / (λ_j - λ_i); that of padding is zero."""
    rows, moved = _rotated(w, vectors), _rotated(change, vectors)
    is_wide = w.shape[1] <= w.shape[2]
    half = moved @ rows.mT if is_wide else moved.mT @ rows
    values = jnp.sum(rows**2, axis=2 if is_wide else 1)
    real = jnp.arange(values.shape[1]) < side[:, None]
    pairs = real[:, None] & real[..., None] & ~jnp.eye(values.shape[1], dtype=bool)
    gaps = jnp.where(pairs, values[:, None] - values[..., None], 1)
    return vectors @ jnp.where(pairs, (half + half.mT) / gaps, 0)


def _fourth_root(dtype: Any) -> float:
    """eps^¼: the square of what is larger, relative to the largest, holds half of the digits."""
    return float(jnp.finfo(dtype).eps) ** 0.25


def _rotated(w: jax.Array, vectors: jax.Array) -> jax.Array:
    """W `[k, n, m]` in the basis of its vectors `[k, p, p]`: `[k, p, m]` or `[k, n, p]`."""
    return vectors.mT @ w if w.shape[1] <= w.shape[2] else w @ vectors


def _left(values: jax.Array, rank: jax.Array) -> jax.Array:
    """The sum of all but the leading eigenvalues, `[k, p] -> [k]`."""
    return jnp.sum(jnp.where(jnp.arange(values.shape[1]) < rank[:, None], 0, jnp.maximum(values, 0)), axis=1)


def _either(which: bool | jax.Array, one: Callable[..., Any], other: Callable[..., Any], *operands: Any) -> Any:
    return one(*operands) if which is True else jax.lax.cond(which, one, other, *operands)


def _settled(first: bool | jax.Array, small: jax.Array, size: jax.Array, gram: jax.Array) -> Pair:
    """One pass over one Gram matrix `[p, p]`, of the directions that are at most `small` of the largest; of all in the first.

    Returns:
      What turns the basis `[p, p]`, and the eigenvalues `[p, 1]`; those of larger directions are only placeholders.  The
      identity and zeros if `size` is zero.
    """
    eye = jnp.eye(len(gram), dtype=gram.dtype)

    def settle(gram: jax.Array) -> Pair:
        tilt, rest = _either(first, lambda gram: (eye, gram), lambda gram: _small_rows(gram, small), gram)
        values, vectors = _decomposed(size, rest)
        return _either(first, lambda tilt, v: v, jnp.matmul, tilt, vectors), values[:, None]

    return (
        settle(gram) if first is True else jax.lax.cond(size > 0, settle, lambda gram: (eye, jnp.zeros_like(gram[:, :1])), gram)
    )


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

    From `gram_eigenvectors`, in a third of the time of an SVD.
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
        tilt, rest = _small_rows(gram, _SMALL)
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


def _small_rows(gram: jax.Array, limit: float | jax.Array) -> Pair:
    """Separates rows of at most `limit` of the largest from the others, by the rows' Gram matrix `[r, r]`.

    All are orthogonal up to rounding of the largest row, which may be larger than the small rows.

    Returns:
      A rotation `[r, r]`, by angles of rounding, that makes small rows orthogonal to large ones; and the Gram matrix of the
      small rows after it, with values above all its eigenvalues, in order, in the places of the large ones.
    """
    squares, r = jnp.diagonal(gram), len(gram)
    large = squares > limit**2 * jnp.max(squares)
    angle = jnp.where(large[:, None] & ~large, ratio(gram, squares[:, None]), 0)
    tilt = jnp.eye(r, dtype=gram.dtype) - angle + angle.T
    tilted = ratio(jnp.where(large[:, None] & ~large, gram, 0), root(squares)[:, None])
    small = jnp.where(large[:, None] | large, 0, gram - tilted.T @ tilted)  # Schur's complement
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


def square_roots(moments: jax.Array) -> jax.Array:
    """`square_root` of many: `[*stack, n, n] -> [k, n, n]`, in float32 or better."""
    moments = moments.astype(wide(moments.dtype))
    return jax.lax.map(square_root, moments.reshape(-1, *moments.shape[-2:]))


def triangular_solves(roots: jax.Array, right: jax.Array) -> jax.Array:
    """R⁻¹B of stacks `[k, n, n]`, upper triangular, and `[k, n, r]`."""
    return jax.lax.map(lambda pair: solve_triangular(*pair), (roots, right))


def unit(*matrices: jax.Array) -> jax.Array:
    """A power of four near the largest magnitude, to measure matrices in; 1 if all are zero.

    Squares of very large or small elements leave the range of float32.  Division by the unit is exact, as is multiplication by
    its root.  It and its inverse are normal numbers: processors may take others for zero.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(matrix)) for matrix in matrices])).astype(wide(matrices[0].dtype))
    info = jnp.finfo(largest.dtype)
    end = 2.0 ** (-info.minexp // 2)
    power = jnp.clip(jax.lax.reduce_precision(jnp.sqrt(largest), info.nexp, 0), 1 / end, end)  # rounded to a power of two
    size = jnp.where(jnp.isfinite(largest), power * power, largest)  # reduced to no mantissa, NaN may become infinite
    return jax.lax.stop_gradient(jnp.where(largest == 0, 1, size))


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
    # Constants are known even under an outer jit.  Of float64, what jax takes is what counts.
    with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):
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
