"""The hidden layer of y = relu(x W) A when only x and y are observed (docs/mathematics.md, section 11).

Inputs and outputs are whitened.  Moments give directions, a regression their signs, and Gauss-Newton converges from there.  If
that ends in a local optimum, the next attempt uses the network found so far to remove most of the moments' sampling noise.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.projection.linalg import highest_precision, solve_gram
from lowrank_jax.theory import moments
from lowrank_jax.theory.directions import common_directions
from lowrank_jax.theory.gauss_newton import Fit, polish, regress
from lowrank_jax.theory.moments import Overview
from lowrank_jax.theory.samples import SampleError, Samples, negligible, rounding

_ATTEMPTS = 10
_PATIENCE = 6  # consecutive attempts without reducing the error by a tenth
_SEEN = 0.8  # the fraction of the samples for Gauss-Newton, at most
_EQUATIONS = 2  # per unknown of W and A, at least
_UNSEEN = 2  # held-out samples per unknown of A, which is fitted to them too, at least
_GOAL = 1e-3  # of what counts as rounding: where Gauss-Newton may stop
_LEARNED = 1e-6  # the unexplained part below which a network counts as found, though not to rounding
_KEPT = 64  # samples per unknown of W for Gauss-Newton; more would not make it faster
_LEAST_KEPT = 2**16


def search(samples: Samples, overview: Overview, width: int, key: jax.Array, say: Callable[[str], None]) -> jax.Array:
    """The best W found, `[n, width]`; the lengths of its columns are arbitrary.

    Raises:
      SampleError: it cannot be found, because of the width, the samples or the directions found in them.

    Warns:
      NotGaussianWarning: the inputs are not Gaussian.
    """
    root, white = _whitened(samples, overview, width)
    # The rest is held out: a network that fits unseen samples has not merely fitted noise.
    count = min(int(_SEEN * overview.count), max(_LEAST_KEPT, _KEPT * samples.inputs * width))
    kept = white.head(count)
    exact = rounding(samples.dtype) * white.outputs
    best: Fit | None = None
    errors: list[float] = []
    for i, attempt in enumerate(jax.random.split(key, _ATTEMPTS)):
        slices, basis, fourth = _slices(white, width, best, attempt)
        if not i:
            moments.warn_if_not_gaussian(overview, fourth)
        fit = polish(kept, count, _directions(kept, slices, basis, attempt), goal=_GOAL * exact)
        best = best if best is not None and best.error <= fit.error else fit
        say(f"attempt {i + 1} of at most {_ATTEMPTS}: {best.error / white.outputs:.1e} of the outputs' power is unexplained")
        errors.append(best.error)
        hopeless = i >= _PATIENCE and best.error > 0.9 * errors[i - _PATIENCE]
        if best.error <= exact or hopeless:
            break
    assert best is not None
    if best.error > _LEARNED * white.outputs:
        _check_directions(white, overview.count, width, best.error / white.outputs)
    return _product(root, best.w)


def start(samples: Samples, overview: Overview, width: int, key: jax.Array) -> jax.Array:
    """W from moments alone: where `search` starts."""
    root, white = _whitened(samples, overview, width)
    slices, basis, _ = _slices(white, width, None, key)
    return _product(root, _directions(white, slices, basis, key))


def _whitened(samples: Samples, overview: Overview, width: int) -> tuple[jax.Array, Samples]:
    _check_size(overview, width)
    root = jnp.asarray(_whitening(overview, samples.dtype))
    return root, samples.through(root, jnp.asarray(_output_whitening(overview, width, samples.dtype)))


def outputs_fitted(samples: Samples, w: jax.Array) -> jax.Array:
    """A by least squares for W, solved twice: the second time for the residual, since the Gram matrix loses digits."""
    gram, products = samples.mean(regress, w)
    a = solve_gram(gram, products)
    _, rest = samples.map(_unexplained, w, a).mean(regress, w)
    return a + solve_gram(gram, rest)


def _slices(white: Samples, width: int, known: Fit | None, key: jax.Array) -> tuple[jax.Array, jax.Array, float]:
    """Moments in the subspace of the columns of W, `[k, m, m]`, a basis `[n, m]` of it, and E |x|⁴.

    If a network is known, its own moments are computed in closed form and only the residual's are sampled, so that only the
    residual has a sampling error.
    """
    rest = white if known is None else white.map(_unexplained, known.w, known.a)
    slices, fourth = moments.second_moments(rest)
    if known is not None:
        slices += moments.second_moments_of(known.w, known.a)
    slices, basis = _within(slices, width)
    if white.outputs < width:  # there are few second moments: a single one determines no directions
        u = _unit_vectors(key, -(-2 * width // white.outputs), width, white.dtype)
        more = moments.fourth_moments(rest.through(basis, jnp.eye(white.outputs, dtype=white.dtype)), u)
        if known is not None:
            more += moments.fourth_moments_of(_product(basis.T, known.w), known.a, u)
        slices = jnp.concatenate([slices, moments.FOURTH * more])
    return slices, basis, fourth


@jax.jit
@highest_precision
def _unexplained(x: jax.Array, y: jax.Array, w: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, y - jax.nn.relu(x @ w) @ a


@functools.partial(jax.jit, static_argnames="width")
@highest_precision
def _within(slices: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The slices `[k, width, width]` in the subspace that holds most of all of them, and its basis `[n, width]`."""
    basis = jnp.linalg.eigh(jnp.einsum("kij,kjl->il", slices, slices))[1][:, -width:]
    return basis.T @ slices @ basis, basis


@functools.partial(jax.jit, static_argnames=("count", "size", "dtype"))
def _unit_vectors(key: jax.Array, count: int, size: int, dtype: Any) -> jax.Array:
    u = jax.random.normal(jax.random.fold_in(key, 1), (count, size), dtype)
    return u / jnp.linalg.norm(u, axis=1, keepdims=True)


def _directions(kept: Samples, slices: jax.Array, basis: jax.Array, key: jax.Array) -> jax.Array:
    """ŵ_j `[n, m]`, with signs from a regression on |z| and z: relu(z) = (|z| + z) / 2."""
    directions = _product(basis, common_directions(slices, slices.shape[1], key))
    return _signed(directions, *kept.mean(_regress_both, directions))


@jax.jit
@highest_precision
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return a @ b


@jax.jit
def _signed(directions: jax.Array, gram: jax.Array, products: jax.Array) -> jax.Array:
    even, odd = jnp.split(solve_gram(gram, products), 2)
    return directions * jnp.where(jnp.sum(even * odd, axis=1) < 0, -1, 1)


@jax.jit
@highest_precision
def _regress_both(x: jax.Array, y: jax.Array, directions: jax.Array) -> tuple[jax.Array, jax.Array]:
    along = x @ directions
    features = jnp.concatenate([jnp.abs(along), along], axis=1)
    return features.T @ features, features.T @ y


def _whitening(overview: Overview, dtype: Any) -> np.ndarray:
    """R `[n, n]` with Rᵀ S R = I, for the inputs' second moment S."""
    values, vectors = np.linalg.eigh(overview.covariance)
    independent = int(np.sum(values > negligible(dtype) * values[-1]))
    if independent < len(values):
        raise SampleError(f"the inputs span {independent} dimensions; all {len(values)} are needed")
    return (vectors / np.sqrt(values)).astype(dtype)


def _output_whitening(overview: Overview, width: int, dtype: Any) -> np.ndarray:
    """T `[outputs, k]` with Tᵀ E yyᵀ T = I: without noise, outputs can be distinguished however small they are."""
    values, vectors = np.linalg.eigh(overview.outputs)
    if not values[-1] > 0:
        raise SampleError("all outputs are zero")
    if overview.variance <= negligible(dtype) * np.trace(overview.outputs):
        raise SampleError("the outputs are constant, which those of relu(x W) A are not")
    independent = int(np.sum(values > negligible(dtype) * values[-1]))
    if independent > width:
        raise SampleError(
            f"the outputs span {independent} dimensions, but a network of width {width} can only produce {width}: the width is "
            "too small, or y is not relu(x W) A without noise"
        )
    return (vectors[:, -independent:] / np.sqrt(values[-independent:])).astype(dtype)


def _check_size(overview: Overview, width: int) -> None:
    n, outputs = len(overview.covariance), len(overview.outputs)
    if width > n:
        raise SampleError(f"width {width} with {n} inputs: the columns of W must be linearly independent, so at most {n}")
    needed = max(-(-_EQUATIONS * width * (n + outputs) // min(outputs, width)), round(_UNSEEN * width / (1 - _SEEN)))
    if overview.count < needed:
        raise SampleError(f"{overview.count} samples are too few: with fewer than {needed} a perfect fit proves nothing")


def _check_directions(white: Samples, count: int, width: int, error: float) -> None:
    """Raises SampleError if fewer than `width` directions stand out from the moments' sampling noise.

    Every element has noise of standard deviation about 1/√N.  Unfolded to `[n, k n]`, the noise has no singular value
    much above (√n + √(k n)) / √N.
    """
    n, outputs = white.inputs, white.outputs
    slices, _ = moments.second_moments(white)
    values = np.linalg.svd(np.asarray(slices).swapaxes(0, 1).reshape(n, -1), compute_uv=False)
    noise = (n**0.5 + (outputs * n) ** 0.5) / count**0.5
    distinct = int(np.sum(values[:width] > noise))
    if distinct < width:
        raise SampleError(
            f"{error:.0e} of the outputs' power is unexplained, and only {distinct} of {width} directions stand out from the "
            "sampling noise: the columns of W are (nearly) linearly dependent, some neurons contribute very little, the width "
            f"is too large, or {count} samples are too few"
        )
