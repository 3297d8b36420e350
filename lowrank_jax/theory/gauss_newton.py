"""Gauss-Newton for y = relu(x W) A, with a curvature that needs no samples.

For Gaussian inputs the expected products of derivatives have a closed form (docs/mathematics.md, section 11).  With it a step
takes one pass over the samples, for the gradient, instead of products of all pairs of unknowns for every sample.  The curvature
of the samples differs from the expected one by about √(n m / N), and each step reduces the error by that factor.  With too few
samples for that to be a reduction, their own curvature is used.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from lowrank_jax.projection.linalg import highest_precision, solve_gram, unit_columns
from lowrank_jax.theory.samples import Samples

_STEPS = 100
_DAMPING = 1e-3  # of a neuron's own curvature, to begin with
_LEAST, _LARGEST, _FACTOR = 1e-9, 1e4, 5.0
_STALLED = 8  # steps that together have not halved the error
_FEW = 4  # samples for an unknown of W: with fewer, the expected curvature is too far from theirs


@flax.struct.dataclass
class Fit:
    """relu(x W) A, its error on the samples and the descent directions.

    Attributes:
      w, a: `[n, m]`, columns of length one, and `[m, outputs]`.
      error: the mean of |y - relu(x W) A|².
      gram: the mean of relu(x W)ᵀ relu(x W), `[m, m]`.
      down_w, down_a: minus half the error's gradients.
    """

    w: jax.Array
    a: jax.Array
    error: float
    gram: jax.Array
    down_w: jax.Array
    down_a: jax.Array


@flax.struct.dataclass
class Curvature:
    """Means of products of derivatives, with s_j = [w_j·x > 0] and h = relu(x W).

    Attributes:
      basis: orthonormal Q `[n, d]`; the components of inputs orthogonal to it are independent of all s.
      second: E s_j s_l z zᵀ for z = Qᵀx, `[d, j, d, l]`.
      shared: E s_j h_l z, `[d, j, l]`.
      outside: E s_j s_l, `[j, l]`: the curvature in every direction orthogonal to Q.
    """

    basis: jax.Array
    second: jax.Array
    shared: jax.Array
    outside: jax.Array


def polish(samples: Samples, count: int, w: jax.Array, *, goal: float) -> Fit:
    """The local optimum reached from W, to rounding.

    Args:
      samples: samples whose inputs are close to N(0, I).
      count: the number of samples.
      w: `[n, m]`, linearly independent.
      goal: the error at which to stop.
    """
    curvature = expected_curvature if count >= _FEW * w.size else functools.partial(sampled_curvature, samples)
    w = unit_columns(w)
    fit = _measure(samples, w, solve_gram(*samples.mean(regress, w)))
    damping, errors = _DAMPING, [fit.error]
    for _ in range(_STEPS):
        trial = _measure(samples, *_step(fit, curvature(fit.w), damping))
        better = trial.error < fit.error  # False for NaN
        fit, damping = (trial, damping / _FACTOR) if better else (fit, damping * _FACTOR)
        damping = max(damping, _LEAST)
        errors.append(fit.error)
        stalled = len(errors) > _STALLED and fit.error > errors[-1 - _STALLED] / 2
        if fit.error <= goal or damping > _LARGEST or stalled:
            break
    return fit


def _measure(samples: Samples, w: jax.Array, a: jax.Array) -> Fit:
    error, gram, down_w, down_a = samples.mean(_gradients, w, a)
    return Fit(w, a, float(error), gram, down_w, down_a)


@jax.jit
@highest_precision
def regress(x: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ relu(x W)ᵀ relu(x W) and Σ relu(x W)ᵀ y, from which `linalg.solve_gram` computes A."""
    hidden = jax.nn.relu(x @ w)
    return hidden.T @ hidden, hidden.T @ y


@jax.jit
@highest_precision
def squared_error(x: jax.Array, y: jax.Array, w: jax.Array, a: jax.Array) -> jax.Array:
    """Σ |y - relu(x W) A|²."""
    return jnp.sum((y - jax.nn.relu(x @ w) @ a) ** 2)


@jax.jit
@highest_precision
def _gradients(x: jax.Array, y: jax.Array, w: jax.Array, a: jax.Array) -> tuple[jax.Array, ...]:
    hidden = jax.nn.relu(x @ w)
    rest = y - hidden @ a
    return jnp.sum(rest**2), hidden.T @ hidden, x.T @ ((rest @ a.T) * (hidden > 0)), hidden.T @ rest


@jax.jit
@highest_precision
def _step(fit: Fit, curvature: Curvature, damping: float) -> tuple[jax.Array, jax.Array]:
    """W and A after a step, with A eliminated.

    The curvature splits into that of W within the span of Q and, for every direction orthogonal to it, the same one of m
    unknowns.
    """
    w, a, q, shared = fit.w, fit.a, curvature.basis, curvature.shared
    d, m = q.shape[1], w.shape[1]
    weights = a @ a.T

    # Eliminating A: a change of W counts by its effect on the outputs after A has been fitted again.
    fitted = solve_gram(fit.gram, fit.down_a)
    coupled = solve_gram(fit.gram, shared.reshape(-1, m).T).T.reshape(d, m, m)
    inner = weights[None, :, None, :] * (curvature.second - jnp.einsum("ajq,blq->ajbl", shared, coupled))
    outer = weights * curvature.outside
    own = jnp.diagonal(weights) / 2
    # A neuron may grow while its row of A shrinks: there is no curvature there, so any value will do.
    along = q.T @ w
    inner += jnp.einsum("aj,bj,j,jl->ajbl", along, along, own, jnp.eye(m, dtype=w.dtype))
    inner = inner.reshape(d * m, d * m)

    down = fit.down_w - q @ jnp.einsum("ajq,qk,jk->aj", shared, fitted, a)
    within = q.T @ down
    across = down - q @ within
    moved = q @ _damped(inner, jnp.tile(own, d), within.reshape(-1), damping).reshape(d, m)
    moved += _damped(outer, own, across.T, damping).T
    returned = solve_gram(fit.gram, jnp.einsum("ajq,aj,jk->qk", shared, q.T @ moved, a))
    w, a = w + moved, a + fitted - returned
    length = jnp.linalg.norm(w, axis=0)
    return w / length, a * length[:, None]


@jax.jit
@highest_precision
def expected_curvature(w: jax.Array) -> Curvature:
    """Over x ~ N(0, I), for columns of length one; Q spans them.  With the angle θ between columns û and v̂

    E s_js_l xxᵀ = (π - θ)/2π I + (ûv̂ᵀ + v̂ûᵀ - cos θ (ûûᵀ + v̂v̂ᵀ)) / (2π sin θ).
    """
    q, unit = jnp.linalg.qr(w)
    m = len(unit)
    cosine = jnp.where(jnp.eye(m, dtype=bool), 1, jnp.clip(unit.T @ unit, -1, 1))
    sine = jnp.sqrt((1 - cosine) * (1 + cosine))
    both = (math.pi - jnp.arccos(cosine)) / (2 * math.pi)
    bend = jnp.where(sine > 1e-6, 1 / (2 * math.pi * jnp.where(sine > 1e-6, sine, 1)), 0)  # none for parallel columns
    squares = jnp.einsum("aj,bj->abj", unit, unit)
    second = jnp.einsum("jl,ab->ajbl", both, jnp.eye(m, dtype=w.dtype))
    second += jnp.einsum("jl,aj,bl->ajbl", bend, unit, unit) + jnp.einsum("jl,al,bj->ajbl", bend, unit, unit)
    second -= jnp.einsum("jl,abj->ajbl", bend * cosine, squares) + jnp.einsum("jl,abl->ajbl", bend * cosine, squares)
    return Curvature(q, second, jnp.einsum("ajbl,bl->ajl", second, unit), both)


def sampled_curvature(samples: Samples, w: jax.Array) -> Curvature:
    """The mean over the samples; Q is the identity."""
    second, shared = samples.mean(_pairs, w)
    (n, m), eye = w.shape, jnp.eye
    return Curvature(eye(n, dtype=w.dtype), second.reshape(n, m, n, m), shared.reshape(n, m, m), eye(m, dtype=w.dtype))


@jax.jit
@highest_precision
def _pairs(x: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    del y
    hidden = jax.nn.relu(x @ w)
    active = (x[:, :, None] * (hidden > 0)[:, None, :]).reshape(len(x), -1)
    return active.T @ active, active.T @ hidden


def _damped(curvature: jax.Array, own: jax.Array, down: jax.Array, damping: float) -> jax.Array:
    return jax.scipy.linalg.solve(curvature + damping * jnp.diag(own), down, assume_a="pos")
