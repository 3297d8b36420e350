"""The gain of the kernel projection over spectral initialisation, and a bound for any low-rank layer, for ReLU.

All risks are E |relu(x W) - relu(x Y)|² over x ~ N(0, I_n), relative to that of Y = 0 (docs/mathematics.md, section 3).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lowrank_jax.projection import linalg, matrix
from lowrank_jax.projection.activations import relu_h
from lowrank_jax.projection.linalg import highest_precision, lengths, ratio, wide


def relative_gap(w: jax.Array, rank: int) -> jax.Array:
    """The risk of the spectral truncation minus that of the projection, relative: Σ_j |w_j|² (h(ρ_j) - ρ_j)² / |W|².

    Args:
      w: `[n, m]`.
      rank: from 1 to min(n, m).

    Returns:
      A scalar in float32 or better, at least 0 (docs/mathematics.md, section 3.3).

    Raises:
      ValueError: w is not a matrix of real, finite numbers, or the rank is out of range.
    """
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    return _gap(w, linalg.gram_eigenvectors(w, rank), rank)


@functools.partial(jax.jit, static_argnames="rank")
@highest_precision
def _gap(w: jax.Array, vectors: jax.Array, rank: int) -> jax.Array:
    w = w.astype(wide(w.dtype)) / linalg.unit(w)
    rho = cosines(w, linalg.leading_directions(w, vectors, rank))
    squares = jnp.sum(w**2, axis=0)
    return ratio(jnp.sum(squares * (relu_h(rho) - rho) ** 2), jnp.sum(squares))


def cosines(w: jax.Array, q: jax.Array) -> jax.Array:
    """ρ_j `[m]`, the cosines between the columns of W `[n, m]` and the span of the orthonormal Q `[n, r]`."""
    return jnp.clip(ratio(lengths(q.T @ w, 1), lengths(w, 1)), 0, 1)


def gaussian_gap(rank: int, n: int) -> float:
    """The limit of the relative gap for i.i.d. Gaussian columns: (h(√(r/n)) - √(r/n))².

    The limit is that of growing m, n and r, with m growing fastest and r/n fixed.  If only m grows, ρ² tends to a beta
    distribution of mean r/n, and the gap to an expectation over it.  That is larger: at rank 2 by 37 % for n = 16, by 4 % for
    n = 256.

    Raises:
      ValueError: the rank is not from 1 to n.
    """
    if not 1 <= rank <= n:
        raise ValueError(f"rank {rank} with {n} inputs: must be from 1 to {n}")
    rho = math.sqrt(rank / n)
    return (_h(rho) - rho) ** 2


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Attributes:
      mean: the sample mean.
      half: half the width of its 95 % confidence interval.
    """

    mean: float
    half: float


@highest_precision
def sampled_gap(key: jax.Array, w: jax.Array, rank: int, *, samples: int = 10**6) -> Estimate:
    """Estimates `relative_gap` from random inputs, the same for both approximations, so that their difference has low variance.

    Args:
      key: for the inputs.
      w, rank: as in `relative_gap`.
      samples: number of inputs.

    Raises:
      ValueError: as in `relative_gap`, or samples is below 1.
    """
    if not linalg.is_count(samples):
        raise ValueError(f"samples must be a whole number from 1, got {samples!r}")
    approximations = [u @ v for u, v in (matrix.spectral(w, rank), matrix.kernel_projection(w, rank))]
    rows = max(1, min(samples, 2**22 // max(w.shape)))
    draws = [_lost(part, w, *approximations, rows) for part in jax.random.split(key, max(2, -(-samples // rows)))]
    total, squares, whole = (float(sum(part)) for part in zip(*draws, strict=True))
    count = rows * len(draws)
    mean = total / count
    deviation = math.sqrt(max(squares / count - mean**2, 0) / count)
    whole = whole or 1.0  # a zero layer loses nothing
    return Estimate(mean * count / whole, 1.96 * deviation * count / whole)


@functools.partial(jax.jit, static_argnames="rows")
@highest_precision
def _lost(key: jax.Array, w: jax.Array, first: jax.Array, second: jax.Array, rows: int) -> tuple[jax.Array, ...]:
    """Sums over samples of the difference of the losses, its square, and the loss of a zero layer."""
    x = jax.random.normal(key, (rows, len(w)), wide(w.dtype))
    y = jax.nn.relu(x @ w)
    losses = [jnp.sum((y - jax.nn.relu(x @ other)) ** 2, axis=1) for other in (first, second)]
    difference = losses[0] - losses[1]
    return difference.sum(), (difference**2).sum(), (y**2).sum()


# --- a bound for any low-rank layer ---


def risk_bound(w: jax.Array, rank: int, *, steps: int = 200) -> jax.Array:
    """A lower bound on the (absolute) risk of any layer of that rank.

    F(Q) = Σ_j |w_j|² g(ρ_j²), g(t) = h(√t)², is not concave in the projector QQᵀ.  It becomes concave if g is replaced by its
    concave envelope and the projectors by all 0 ⪯ P ⪯ I of trace r.  Then every linearisation is an upper bound: in each step
    of Frank-Wolfe, a sum of r eigenvalues.  The least of these bounds is used (docs/mathematics.md, section 3.5).

    Args:
      w: `[n, m]`.
      rank: from 1 to min(n, m).
      steps: number of Frank-Wolfe steps.

    Raises:
      ValueError: w is not a matrix of real, finite numbers, the rank is out of range, or steps is below 1.
    """
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    if not linalg.is_count(steps):
        raise ValueError(f"steps must be a whole number from 1, got {steps!r}")
    return _bound(w, rank, steps)


@functools.partial(jax.jit, static_argnames=("rank", "steps"))
@highest_precision
def _bound(w: jax.Array, rank: int, steps: int) -> jax.Array:
    size = linalg.unit(w)
    w = w.astype(wide(w.dtype)) / size
    squares = jnp.sum(w**2, axis=0)
    unit = ratio(w, jnp.sqrt(squares))

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        p, least = state
        t = jnp.clip(jnp.sum(unit * (p @ unit), axis=0), 1e-6, 1)
        value, slope = jax.jvp(_concave, (t,), (jnp.ones_like(t),))
        values, vectors = jnp.linalg.eigh((slope * w) @ w.T)
        bound = jnp.sum(squares * (value - slope * t)) + jnp.sum(values[-rank:])
        q = vectors[:, -rank:]
        return p + (q @ q.T - p) * 2 / (i + 2), jnp.minimum(least, bound)

    begin = jnp.eye(len(w), dtype=w.dtype) * rank / len(w)
    _, highest = jax.lax.fori_loop(0, steps, step, (begin, jnp.asarray(jnp.inf, w.dtype)))
    whole = jnp.sum(squares)
    # A margin for the rounding of eigenvalues and sums: the bound must hold.
    return jnp.maximum((whole - highest) / 2 - max(w.shape) * jnp.finfo(w.dtype).eps * whole, 0) * size**2


def _concave(t: jax.Array) -> jax.Array:
    """The concave envelope of g on [0, 1]: g up to the point whose tangent goes through (1, 1), then that tangent."""
    touch = _touch()
    low = jnp.minimum(t, touch)
    return relu_h(jnp.sqrt(low)) ** 2 + _slope(touch) * (t - low)


@functools.lru_cache
def _touch() -> float:
    """The t at which g(t) + (1 - t) g'(t) = 1, by bisection: 0.19."""

    def above(t: float) -> float:
        return _h(math.sqrt(t)) ** 2 + (1 - t) * _slope(t) - 1

    low, high = 0.01, 0.6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) > 0 else (low, middle)
    return (low + high) / 2


def _slope(t: float) -> float:
    """g'(t) = h(ρ) h'(ρ) / ρ at ρ = √t."""
    rho = math.sqrt(t)
    return _h(rho) * (math.pi - math.acos(rho)) / math.pi / rho


def _h(rho: float) -> float:
    """`activations.relu_h` of a Python float."""
    return (math.sqrt(1 - rho**2) + (math.pi - math.acos(rho)) * rho) / math.pi
