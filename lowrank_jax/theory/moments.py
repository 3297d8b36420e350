"""Hermite moments of a function, and tests of whether its inputs are Gaussian.

For y = relu(x W) A with x ~ N(0, I_n), w_j = |w_j| ŵ_j and c_jk = |w_j| A_jk / √(2π), the second and the contracted fourth
moments share their directions (docs/mathematics.md, section 11):

    E y_k He₂(x) = Σ_j c_jk ŵ_jŵ_jᵀ,        E y_k He₄(x)[u, u] = - Σ_j c_jk (u·ŵ_j)² ŵ_jŵ_jᵀ.
"""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.projection.linalg import highest_precision
from lowrank_jax.theory.samples import SampleError, Samples, rounding

FOURTH = 0.3  # the weight of slices of the fourth moment, which are noisier than those of the second moment


class NotGaussianWarning(UserWarning):
    """The inputs are not Gaussian with mean zero: the guarantees for learning from samples do not cover them."""


@dataclasses.dataclass(frozen=True)
class Overview:
    """Statistics from one pass over the samples, on the host and in float64.

    Attributes:
      count: the number of samples.
      covariance: E xxᵀ `[n, n]`.
      outputs: E yyᵀ `[outputs, outputs]`.
      mean_output: E y `[outputs]`.
      powers: the mean of every input's first four powers, `[4, n]`.
    """

    count: int
    covariance: np.ndarray
    outputs: np.ndarray
    mean_output: np.ndarray
    powers: np.ndarray

    @property
    def variance(self) -> float:
        """The variance of all outputs together."""
        return float(np.trace(self.outputs) - np.sum(self.mean_output**2))


def look(samples: Samples) -> Overview:
    """An overview of the samples.

    Raises:
      SampleError: values are NaN or infinite, or so large or small that errors are out of range in their dtype.
    """
    total, count = samples.total(_look)
    covariance, outputs, mean_output, powers = (np.asarray(part, np.float64) / count for part in total)
    if not (np.isfinite(covariance).all() and np.isfinite(outputs).all()):
        raise SampleError("the samples contain non-finite values, or values whose squares overflow")
    least, beyond = float(jnp.finfo(samples.dtype).tiny), f"beyond the range of {jnp.dtype(samples.dtype)}: scale"
    if not np.isfinite(powers).all() or (powers[3].max() < least and powers[0].any()):
        raise SampleError(f"the inputs' fourth powers are {beyond} x")
    if np.trace(outputs) * rounding(samples.dtype) < least and mean_output.any():
        raise SampleError(f"squared errors of the outputs are {beyond} y")
    return Overview(count, covariance, outputs, mean_output, powers)


@jax.jit
@highest_precision
def _look(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    return x.T @ x, y.T @ y, y.sum(axis=0), jnp.stack([(x**power).sum(axis=0) for power in (1, 2, 3, 4)])


@jax.jit
@highest_precision
def _second(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ y, Σ y_k xxᵀ as `[n, k n]`, and Σ |x|⁴."""
    return y.sum(axis=0), x.T @ _products(y, x), jnp.sum(jnp.sum(x**2, axis=1) ** 2)


@jax.jit
@highest_precision
def _fourth(x: jax.Array, y: jax.Array, u: jax.Array) -> tuple[jax.Array, ...]:
    """The terms of He₄[u, u] summed over samples, for every direction u_l and output k, along one axis l k."""
    along = x @ u.T
    weights, linear = _products(along**2 - 1, y), _products(along, y)
    return y.sum(axis=0), weights.sum(axis=0), x.T @ linear, x.T @ _products(weights, x)


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """The outer products of the rows of a `[rows, p]` and b `[rows, q]`: `[rows, p q]`."""
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def second_moments(samples: Samples) -> tuple[jax.Array, float]:
    """E y_k (xxᵀ - I), `[outputs, n, n]`, and E |x|⁴, for inputs whose second moment is I."""
    mean, products, fourth = samples.mean(_second)
    return _second_slices(mean, products), float(fourth)


@jax.jit
def _second_slices(mean: jax.Array, products: jax.Array) -> jax.Array:
    n = len(products)
    return products.reshape(n, -1, n).swapaxes(0, 1) - mean[:, None, None] * jnp.eye(n, dtype=mean.dtype)


def fourth_moments(samples: Samples, u: jax.Array) -> jax.Array:
    """E y_k He₄(x)[u_l, u_l], `[l k, n, n]`, for directions u `[l, n]` of length one."""
    return _fourth_slices(u, *samples.mean(_fourth, u))


@jax.jit
def _fourth_slices(u: jax.Array, mean: jax.Array, weights: jax.Array, linear: jax.Array, products: jax.Array) -> jax.Array:
    n = len(products)
    slices = products.reshape(n, -1, n).swapaxes(0, 1)
    u, mean = jnp.repeat(u, len(mean), axis=0), jnp.tile(mean, len(u))
    cross = u[:, :, None] * linear.T[:, None, :]
    own = 2 * mean[:, None, None] * u[:, :, None] * u[:, None, :]
    return slices - weights[:, None, None] * jnp.eye(n, dtype=u.dtype) - 2 * (cross + cross.mT) + own


@jax.jit
@highest_precision
def second_moments_of(w: jax.Array, a: jax.Array) -> jax.Array:
    """The expected `second_moments` of relu(x W) A for Gaussian inputs and columns of length one: `[outputs, n, n]`."""
    return _slices(w, a)


@jax.jit
@highest_precision
def fourth_moments_of(w: jax.Array, a: jax.Array, u: jax.Array) -> jax.Array:
    """The expected `fourth_moments`, `[l k, n, n]`; W may be the projection of columns of length one on a subspace."""
    along = (w.T @ u.T) ** 2
    return -_slices(w, (along[:, :, None] * a[:, None, :]).reshape(len(a), -1))


def _slices(w: jax.Array, a: jax.Array) -> jax.Array:
    return jnp.einsum("ij,jk,lj->kil", w, a / math.sqrt(2 * math.pi), w)


# --- are they Gaussian? ---

_CONSTANT = 1e-6  # of an input's mean square: a smaller variance is rounding
_DOUBT = 6.0  # standard deviations: none of a few hundred means of Gaussian samples is so far off


def warn_if_not_gaussian(overview: Overview, fourth: float) -> None:
    """Tests the inputs' mean (Hotelling), every input's third and fourth moment, and E |z|⁴ of the whitened inputs z (Mardia).

    Each is compared with its distribution for samples of N(0, S), where S is the second moment of the samples.  Inputs whose
    moments up to the fourth are those of a Gaussian pass, Gaussian or not.

    Warns:
      NotGaussianWarning: names the worst deviation.
    """
    reason = not_gaussian(overview, fourth)
    if reason:
        warnings.warn(f"{reason}: the guarantees do not cover such inputs", NotGaussianWarning, stacklevel=5)


def not_gaussian(overview: Overview, fourth: float) -> str | None:
    """Why the inputs do not look Gaussian, for a message; None if they do."""
    n, count = overview.powers.shape[1], overview.count
    one, two, three, four = overview.powers
    variance = two - one**2
    if (constant := variance <= _CONSTANT * two).any():
        return f"input {int(np.argmax(constant))} is constant (relu(x W) A has no biases)"
    skewness = (three - 3 * one * two + 2 * one**3) / variance**1.5
    kurtosis = (four - 4 * one * three + 6 * one**2 * two - 3 * one**4) / variance**2
    expected = n * (n + 2) * count / (count + 2)  # for inputs whitened by their own second moment
    doubts = [
        _mean_doubt(overview),
        _worst(skewness * math.sqrt(count / 6), skewness, "input {} has a skewness of {:.3g}, not 0"),
        _worst(_kurtosis_score(kurtosis, count), kurtosis, "input {} has a kurtosis of {:.3g}, not 3"),
        (
            abs(fourth - expected) / math.sqrt(8 * n * (n + 2) / count),
            f"the whitened inputs have E |z|^4 = {fourth:.4g}, not {expected:.4g}",
        ),
    ]
    worst, words = max(doubts)
    return f"{words} ({worst:.3g} standard deviations of a Gaussian sample's)" if worst > _DOUBT else None


def _mean_doubt(overview: Overview) -> tuple[float, str]:
    """Hotelling's test, with its F statistic transformed to a standard Gaussian by Paulson's method.

    E. Paulson, An approximate normalization of the analysis of variance distribution, Ann. Math. Statist. 13 (1942).
    """
    n, count, mean = len(overview.covariance), overview.count, overview.powers[0]
    share = min(
        float(mean @ np.linalg.solve(overview.covariance, mean)), 1
    )  # the mean's share of the whitened inputs' mean square
    if count - n < 4:  # too few for the test and for the approximation
        return 0.0, ""
    f = share * (count - n) / (n * max(1 - share, np.finfo(np.float64).tiny))
    a, b = 2 / (9 * n), 2 / (9 * (count - n))
    score = ((1 - b) * f ** (1 / 3) - (1 - a)) / math.sqrt(a + b * f ** (2 / 3))
    return score, f"the inputs' mean is {math.sqrt(share):.3g} standard deviations from zero"


def _worst(scores: np.ndarray, values: np.ndarray, words: str) -> tuple[float, str]:
    i = int(np.argmax(abs(scores)))
    return float(abs(scores[i])), words.format(i, values[i])


def _kurtosis_score(kurtosis: np.ndarray, count: int) -> np.ndarray:
    """The kurtosis of N Gaussian samples, transformed to a standard Gaussian: for small N its own distribution is skewed.

    F. J. Anscombe and W. J. Glynn, Distribution of the kurtosis statistic b2 for normal samples, Biometrika 70 (1983).
    """
    n = max(count, 8)
    variance = 24.0 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    x = (kurtosis - 3 * (n - 1) / (n + 1)) / math.sqrt(variance)
    beta = 6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9)) * math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    a = 6 + 8 / beta * (2 / beta + math.sqrt(1 + 4 / beta**2))
    root = np.cbrt((1 - 2 / a) / np.maximum(1 + x * math.sqrt(2 / (a - 4)), np.finfo(np.float64).tiny))
    return (1 - 2 / (9 * a) - root) / math.sqrt(2 / (9 * a))


def agrees_with_identity(covariance: np.ndarray, count: int) -> bool:
    """Whether samples of N(0, I) could have this second moment `[n, n]` (Nagao's test: N/2 |S - I|² is chi-squared)."""
    n = len(covariance)
    degrees = n * (n + 1) / 2
    excess = np.sum((covariance - np.eye(n)) ** 2)
    return bool(count / 2 * excess < degrees + _DOUBT * math.sqrt(2 * degrees) + _DOUBT**2)
