"""What the kernel projection has to know about the activation that follows a kernel.

The activations here are positively homogeneous: sigma(c x) = c sigma(x) for c > 0.  For Gaussian x and vectors w, y at an
angle with cosine rho,

    E sigma(w.x) sigma(y.x) = gain |w| |y| h(rho),        h(1) = 1,

so the best norm and the risk are closed forms in h (docs/mathematics.md, section 3).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank_jax.paths import did_you_mean


@dataclasses.dataclass(frozen=True)
class Activation:
    """A positively homogeneous activation.

    Attributes:
      gain: E sigma(z)^2 for a standard Gaussian z.
      h: the normalised dual activation, [-1, 1] -> R, elementwise.
    """

    gain: float
    h: Callable[[jax.Array], jax.Array]


@jax.custom_jvp
def relu_h(rho: jax.Array) -> jax.Array:
    """h(rho) = (sqrt(1 - rho^2) + (pi - arccos rho) rho) / pi, the arc-cosine kernel of order one (Cho and Saul, 2009)."""
    rho = jnp.clip(rho, -1.0, 1.0)
    # (1 - rho)(1 + rho) keeps its digits near rho = 1, where 1 - rho^2 cancels.
    return (jnp.sqrt((1 - rho) * (1 + rho)) + (jnp.pi - jnp.arccos(rho)) * rho) / jnp.pi


@relu_h.defjvp
def _(primals, tangents):
    # h' = (pi - arccos rho) / pi is finite everywhere; differentiating term by term gives inf - inf at rho = 1.
    (rho,), (tangent,) = primals, tangents
    slope = (jnp.pi - jnp.arccos(jnp.clip(rho, -1.0, 1.0))) / jnp.pi
    return relu_h(rho), slope * tangent


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(gain=0.5, h=relu_h),
    "identity": Activation(gain=1.0, h=lambda rho: rho),
}


def get(name: str) -> Activation:
    """The activation of that name.

    Raises:
      ValueError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}{did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
