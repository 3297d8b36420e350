"""Dual activations: what the kernel projection needs to know about the activation that follows a kernel.

For Gaussian x and vectors w, y of lengths s, t at an angle with cosine rho, everything follows from the dual activation

    K(s, t, rho) = E sigma(w.x) sigma(y.x):

the risk of replacing w by y is K(s, s, 1) + K(t, t, 1) - 2 K(s, t, rho), and the best length of y minimises it over t
(docs/mathematics.md, sections 3 and 4).  `Homogeneous` activations have closed forms, all others a Hermite series.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

from lowrank_jax.text import did_you_mean, first_line

Function = Callable[[jax.Array], jax.Array]


class Activation(Protocol):
    """An activation as a projection sees it; both methods are elementwise over columns, and arrays broadcast."""

    @property
    def fn(self) -> Function:
        """sigma itself, elementwise."""
        ...

    def risk(self, s: jax.Array, t: jax.Array, rho: jax.Array) -> jax.Array:
        """E (sigma(w.x) - sigma(y.x))² for lengths s, t >= 0 and a cosine in [-1, 1]."""
        ...

    def best_length(self, s: jax.Array, rho: jax.Array) -> jax.Array:
        """The t that minimises `risk(s, t, rho)`, for rho >= 0; for a `Scalar`, within [0, 2s]."""
        ...


ActivationLike = str | Activation | Function  # what `get` takes


@dataclasses.dataclass(frozen=True)
class Homogeneous:
    """A positively homogeneous activation: sigma(c x) = c sigma(x) for c > 0, so K(s, t, rho) = gain s t h(rho), h(1) = 1.

    Attributes:
      fn: sigma itself, elementwise.
      gain: E sigma(z)² for a standard Gaussian z.
      h: the normalised dual activation, [-1, 1] -> R, elementwise; increasing.
    """

    fn: Function
    gain: float
    h: Function

    def risk(self, s: jax.Array, t: jax.Array, rho: jax.Array) -> jax.Array:
        return self.gain * ((s - t) ** 2 + 2 * s * t * (1 - self.h(rho)))

    def best_length(self, s: jax.Array, rho: jax.Array) -> jax.Array:
        return s * jnp.maximum(self.h(rho), 0)


@dataclasses.dataclass(frozen=True)
class Scalar:
    """Any scalar activation, by its Hermite coefficients alpha_k(s) = E sigma(s z) he_k(z).

    K(s, t, rho) = Σ_k alpha_k(s) alpha_k(t) rho^k.  The first `TERMS` are summed.  The remainder is known at rho = ±1, where
    the sum is a plain expectation, and is assumed to decay like the first omitted term.  Risks are accurate to 5e-5 of a
    column's whole risk for smooth functions at lengths up to 3, to 1e-3 for functions with a kink, and less so for steep
    functions, which approach a jump (docs/mathematics.md, section 4).

    Attributes:
      fn: sigma itself, an elementwise JAX function.
    """

    fn: Function

    def risk(self, s: jax.Array, t: jax.Array, rho: jax.Array) -> jax.Array:
        s, t, rho = jnp.broadcast_arrays(s, t, rho)
        a, b = self._section(s), self._section(t)
        powers, even_power, odd_power = _powers(rho)
        products = (a @ _basis(a).T) * (b @ _basis(b).T)
        even, odd = _even(a), a - _even(a)
        even_rest = jnp.sum(even * b, axis=-1) - jnp.sum(products[..., ::2], axis=-1)
        odd_rest = jnp.sum(odd * b, axis=-1) - jnp.sum(products[..., 1::2], axis=-1)
        lost = jnp.sum((1 - powers) * products, axis=-1) + (1 - even_power) * even_rest + (1 - odd_power) * odd_rest
        return jnp.sum((a - b) ** 2, axis=-1) + 2 * lost

    def best_length(self, s: jax.Array, rho: jax.Array) -> jax.Array:
        s, rho = jnp.broadcast_arrays(s, rho)
        smoothed = self._smoothed(s, rho)

        def loss(t, target):
            return jnp.sum((self._section(t) - target) ** 2, axis=-1)

        fixed = jax.lax.stop_gradient(smoothed)
        t = minimise(lambda t: loss(t, fixed), 2 * jax.lax.stop_gradient(s))
        return _newton_step(loss, t, smoothed, s)

    def _section(self, s: jax.Array) -> jax.Array:
        """sigma(s z) - sigma(0) at the nodes z, times the square roots of their weights: `[...] -> [..., nodes]`.

        The constant does not change any risk; without sigma(0), a zero column has a zero section.
        """
        z, root, _ = (jnp.asarray(part, s.dtype) for part in _nodes())
        return root * (self.fn(s[..., None] * z) - self.fn(jnp.zeros((), s.dtype)))

    def _smoothed(self, s: jax.Array, rho: jax.Array) -> jax.Array:
        """E[sigma(w.x) | y.x], the function that sigma(t z) has to approximate: `[..., nodes]`."""
        a = self._section(s)
        powers, even_power, odd_power = (part if part.ndim > s.ndim else part[..., None] for part in _powers(rho))
        rest = jnp.where(jnp.arange(TERMS) % 2, odd_power, even_power)
        even = _even(a)
        return ((powers - rest) * (a @ _basis(a).T)) @ _basis(a) + even_power * even + odd_power * (a - even)


TERMS = 48  # even, so that the first omitted term belongs to the even part
_NODES = 256
_CUT = 10.0


@functools.cache
def _nodes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes z `[nodes]`, square roots of their weights, and root · he_k(z) `[TERMS, nodes]` (orthonormal Hermite polynomials).

    An even grid: under a Gaussian weight it converges exponentially for smooth functions, like Gauss-Hermite quadrature, and is
    far better for kinks and steep sections.  It is symmetric about zero but avoids zero, where most activations have a kink.
    """
    width = 2 * _CUT / _NODES
    z = -_CUT + width * (np.arange(_NODES) + 0.5)
    root = np.sqrt(width * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))
    rows = [root, z * root]
    for k in range(1, TERMS - 1):
        rows.append((z * rows[k] - np.sqrt(k) * rows[k - 1]) / np.sqrt(k + 1))
    return z, root, np.stack(rows)


def _basis(like: jax.Array) -> jax.Array:
    return jnp.asarray(_nodes()[2], like.dtype)


def _even(values: jax.Array) -> jax.Array:
    """The even part of a function sampled at the nodes."""
    return (values + values[..., ::-1]) / 2


def _powers(rho: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """rho^k for k < TERMS `[..., TERMS]`, and the powers `[...]` used for the omitted even and odd terms."""
    repeated = jnp.broadcast_to(rho[..., None], (*rho.shape, TERMS + 1))
    powers = jnp.cumprod(repeated, axis=-1)  # products, not `**`: rho may be negative or zero
    return jnp.concatenate([jnp.ones_like(repeated[..., :1]), powers[..., :-2]], -1), powers[..., -2], powers[..., -1]


def minimise(loss: Function, high: jax.Array) -> jax.Array:
    """The minimiser of an elementwise `loss(t)` on [0, high]: a grid search, then golden-section search.

    Args:
      loss: `[...] -> [...]`; each element depends on its own t alone.
      high: the upper ends of the intervals, `[...]`.
    """
    points, sections, golden = 16, 24, (math.sqrt(5) - 1) / 2
    values = jax.lax.map(lambda i: loss(high * i / points), jnp.arange(points + 1, dtype=high.dtype))
    best = jnp.argmin(values, axis=0)

    def shrink(_, bracket):
        low, top = bracket
        left, right = top - golden * (top - low), low + golden * (top - low)
        keep_left = loss(left) < loss(right)  # where it is flat, as for a jump, away from zero
        return jnp.where(keep_left, low, left), jnp.where(keep_left, right, top)

    bracket = high * jnp.maximum(best - 1, 0) / points, high * jnp.minimum(best + 1, points) / points
    low, top = jax.lax.fori_loop(0, sections, shrink, bracket)
    middle = (low + top) / 2
    at_zero = values[0] <= loss(middle)  # for an odd sigma and orthogonal columns, zero is best
    return jnp.where(at_zero, 0, middle)


def _newton_step(loss: Callable[[jax.Array, jax.Array], jax.Array], t: jax.Array, target: jax.Array, s: jax.Array) -> jax.Array:
    """One Newton step from the minimum found so far: it adds digits and carries the derivative with respect to `target`.

    Comparing values gives a minimum to half of the digits only, and has no derivative.
    """

    def slope(t):
        return jax.jvp(lambda t: loss(t, target), (t,), (jnp.ones_like(t),))[1]

    first, second = jax.jvp(slope, (t,), (jnp.ones_like(t),))
    second = jax.lax.stop_gradient(second)
    convex = second > 0
    step = jnp.where(convex, -first / jnp.where(convex, second, 1), 0)
    # Where sigma has a kink or a jump, the second derivative cannot be trusted.
    return t + jnp.where(jnp.abs(step) <= 1e-2 * s, step, 0)


@jax.custom_jvp
def relu_h(rho: jax.Array) -> jax.Array:
    """h(rho) = (sqrt(1 - rho^2) + (pi - arccos rho) rho) / pi, the arc-cosine kernel of order one (Cho and Saul, 2009)."""
    rho = jnp.clip(rho, -1.0, 1.0)
    # (1 - rho)(1 + rho) keeps its digits near rho = 1, where 1 - rho^2 cancels.
    return (jnp.sqrt((1 - rho) * (1 + rho)) + (jnp.pi - jnp.arccos(rho)) * rho) / jnp.pi


@relu_h.defjvp
def _(primals, tangents):
    # h' = (pi - arccos rho) / pi is finite everywhere; differentiating term by term would give inf - inf at rho = 1.
    (rho,), (tangent,) = primals, tangents
    slope = (jnp.pi - jnp.arccos(jnp.clip(rho, -1.0, 1.0))) / jnp.pi
    return relu_h(rho), slope * tangent


@functools.cache  # one object per slope, so that it compiles once
def leaky_relu(slope: float) -> Homogeneous:
    """x for x > 0, slope · x below: `nn.leaky_relu(x, slope)`.

    It is slope · x + (1 - slope) relu(x), so its dual activation mixes those of the identity and the ReLU.
    """
    power = 1 + slope**2
    return Homogeneous(
        fn=functools.partial(nn.leaky_relu, negative_slope=slope),
        gain=power / 2,
        h=lambda rho: ((1 - slope) ** 2 * relu_h(rho) + 2 * slope * rho) / power,
    )


ACTIVATIONS: dict[str, Activation] = {
    "identity": Homogeneous(fn=lambda x: x, gain=1.0, h=lambda rho: rho),
    "relu": Homogeneous(fn=nn.relu, gain=0.5, h=relu_h),
    "leaky_relu": leaky_relu(0.01),  # the slope of nn.leaky_relu
    "silu": Scalar(nn.silu),
    "gelu": Scalar(functools.partial(nn.gelu, approximate=False)),
    "gelu_tanh": Scalar(functools.partial(nn.gelu, approximate=True)),  # what nn.gelu is by default
    "tanh": Scalar(jnp.tanh),
    "sigmoid": Scalar(nn.sigmoid),
    "softplus": Scalar(nn.softplus),
    "elu": Scalar(nn.elu),
    "hard_swish": Scalar(nn.hard_swish),
    "relu6": Scalar(nn.relu6),
    "hard_tanh": Scalar(nn.hard_tanh),
    "mish": Scalar(nn.mish),
    "softsign": Scalar(nn.soft_sign),
}
ACTIVATIONS["swish"] = ACTIVATIONS["silu"]


def get(activation: ActivationLike) -> Activation:
    """An activation from its name, an `Activation` or a scalar function.

    Raises:
      ValueError: unknown name, or not an elementwise function.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}{did_you_mean(activation, ACTIVATIONS)}")
        return ACTIVATIONS[activation]
    if hasattr(activation, "best_length"):
        return activation  # type: ignore[return-value]
    if not callable(activation):
        raise ValueError(f"activation {activation!r} is neither a name nor a function")
    _probe(activation)
    return Scalar(activation)


@functools.lru_cache(maxsize=256)
def _probe(fn: Function) -> None:
    """Raises ValueError unless it is an elementwise function that JAX can trace, finite around zero."""
    points = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    try:
        with jax.ensure_compile_time_eval():
            values, alone = jax.jit(fn)(points), jax.jit(fn)(points[0, 0])
            good = values.shape == (2, 4) and alone.shape == () and bool(jnp.isfinite(values).all())
            good = good and bool(jnp.allclose(values[0, 0], alone, rtol=1e-5, atol=1e-6))
    except Exception as error:  # a user's function may raise anything
        raise ValueError(f"activation {fn!r} cannot be traced by jax: {first_line(error)}") from error
    if not good:
        raise ValueError(f"activation {fn!r} is not an elementwise function, finite at every number")
