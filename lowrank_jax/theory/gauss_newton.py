"""Gauss–Newton for y = relu(x W) A, with a curvature that needs no samples.

Of Gaussian inputs the expected products of derivatives are known in closed form (docs/mathematics.md, section 11).  With them a
step costs one look at the samples, for the gradient, instead of one at all pairs of unknowns of all samples; what the samples'
own curvature differs by, √(n m / N), is the factor by which a step then reduces the error.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lowrank_jax.linalg import highest_precision
from lowrank_jax.theory.samples import Samples

_STEPS = 100
_DAMPING = 1e-3  # of a neuron's own curvature, to begin with
_LEAST, _LARGEST, _FACTOR = 1e-9, 1e4, 5.0
_STALLED = 8  # steps that together have not halved the error


@dataclasses.dataclass(frozen=True)
class Fit:
    """relu(x W) A, how far it is from the samples, and which way is down.

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


def polish(samples: Samples, w: jax.Array, *, goal: float) -> Fit:
    """The local optimum that is reached from W, to rounding.

    Args:
      samples: of inputs close to N(0, I).
      w: `[n, m]`, linearly independent.
      goal: the error at which to be content.
    """
    w = _unit(w)
    fit = _measure(samples, w, solve(*samples.mean(regress, w)))
    damping, errors = _DAMPING, [fit.error]
    for _ in range(_STEPS):
        trial = _measure(samples, *_step(fit.w, fit.a, fit.gram, fit.down_w, fit.down_a, damping))
        better = trial.error < fit.error  # False of NaN
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
    """Σ relu(x W)ᵀ relu(x W) and Σ relu(x W)ᵀ y, of which `solve` makes A."""
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
def _step(
    w: jax.Array, a: jax.Array, gram: jax.Array, down_w: jax.Array, down_a: jax.Array, damping: float
) -> tuple[jax.Array, jax.Array]:
    """W and A after a step, A's part eliminated.

    In an orthonormal basis Q of W's columns the curvature falls into m² unknowns within their span and, for each of the n - m
    directions at right angles to it, the same m.
    """
    m = w.shape[1]
    q, r = jnp.linalg.qr(w)
    second, shared, angles = _curvatures(r)
    weights = a @ a.T

    # Eliminating A: what a change of W does to the outputs is felt after A has been fitted again.
    fitted = solve(gram, down_a)
    coupled = solve(gram, shared.reshape(-1, m).T).T.reshape(m, m, m)
    inner = weights[None, :, None, :] * (second - jnp.einsum("ajq,blq->ajbl", shared, coupled))
    outer = weights * angles
    own = jnp.diagonal(outer)
    # A neuron may grow while its row of A shrinks: no curvature there, so any will do.
    unit = _unit(r)
    inner += jnp.einsum("aj,bj,j,jl->ajbl", unit, unit, own, jnp.eye(m, dtype=w.dtype))
    inner = inner.reshape(m * m, m * m)

    down = down_w - q @ jnp.einsum("ajq,qk,jk->aj", shared, fitted, a)
    within = q.T @ down
    across = down - q @ within
    moved = q @ _damped(inner, jnp.tile(own, m), within.reshape(-1), damping).reshape(m, m)
    moved += _damped(outer, own, across.T, damping).T
    returned = solve(gram, jnp.einsum("ajq,aj,jk->qk", shared, q.T @ moved, a))
    w, a = w + moved, a + fitted - returned
    length = jnp.linalg.norm(w, axis=0)
    return w / length, a * length[:, None]


def _curvatures(r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For columns r_j of R `[m, m]` and x ~ N(0, I_m), with s_j = [r_j·x > 0] and angles θ_jl between them:

    E s_js_l xxᵀ = (π - θ)/2π I + (ûv̂ᵀ + v̂ûᵀ - cos θ (ûûᵀ + v̂v̂ᵀ)) / (2π sin θ), where û, v̂ are the unit r_j, r_l.

    Returns:
      That as `[m, j, m, l]`; E s_j x relu(r_l·x), `[m, j, l]`; and (π - θ)/2π `[j, l]`, all there is at right angles to R.
    """
    m = len(r)
    unit = _unit(r)
    cosine = jnp.clip(unit.T @ unit, -1, 1)
    cosine = jnp.where(jnp.eye(m, dtype=bool), 1, cosine)
    sine = jnp.sqrt(jnp.maximum(1 - cosine**2, 0))
    both = (math.pi - jnp.arccos(cosine)) / (2 * math.pi)
    bend = jnp.where(sine > 1e-6, 1 / (2 * math.pi * jnp.where(sine > 1e-6, sine, 1)), 0)  # parallel ones have none
    squares = jnp.einsum("aj,bj->abj", unit, unit)
    second = jnp.einsum("jl,ab->ajbl", both, jnp.eye(m, dtype=r.dtype))
    second += jnp.einsum("jl,aj,bl->ajbl", bend, unit, unit) + jnp.einsum("jl,al,bj->ajbl", bend, unit, unit)
    second -= jnp.einsum("jl,abj->ajbl", bend * cosine, squares) + jnp.einsum("jl,abl->ajbl", bend * cosine, squares)
    return second, jnp.einsum("ajbl,bl->ajl", second, r), both


def _damped(curvature: jax.Array, own: jax.Array, down: jax.Array, damping: float) -> jax.Array:
    return jax.scipy.linalg.solve(curvature + damping * jnp.diag(own), down, assume_a="pos")


@jax.jit
def solve(gram: jax.Array, right: jax.Array) -> jax.Array:
    """G⁻¹ B of a Gram matrix, which may be singular to rounding."""
    ridge = jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    return jax.scipy.linalg.solve(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype), right, assume_a="pos")


@jax.jit
def _unit(w: jax.Array) -> jax.Array:
    return w / jnp.linalg.norm(w, axis=0)
