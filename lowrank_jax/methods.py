"""How a dense kernel becomes a factor pair: one table, from a method's name to its function."""

from typing import Protocol

import jax
import jax.numpy as jnp

from lowrank_jax import projection


class Method(Protocol):
    """A matrix `[n, m]` to factors `[n, rank]` and `[rank, m]`; `key` is for methods that draw."""

    def __call__(
        self, key: jax.Array, w: jax.Array, rank: int, *, activation: str, group: int
    ) -> tuple[jax.Array, jax.Array]: ...


def _spectral(key, w, rank, *, activation, group):
    del key, activation, group
    return projection.spectral(w, rank)


def _kernel_projection(key, w, rank, *, activation, group):
    del key
    return projection.kernel_projection(w, rank, activation=activation, group=group)


def _random(key, w, rank, *, activation, group):
    """Independent Gaussian factors scaled by their fan-in, as He et al. do; each element of UV varies as one of W does.

    U has the variance of W itself (2/n when W is He-initialised) and V has 1/rank, so the product keeps W's variance.
    """
    del activation, group
    n, m = w.shape
    wide = jnp.promote_types(w.dtype, jnp.float32)
    deviation = jnp.sqrt(jnp.mean(jnp.square(w.astype(wide))))
    key_u, key_v = jax.random.split(key)
    u = deviation * jax.random.normal(key_u, (n, rank), wide)
    v = jax.random.normal(key_v, (rank, m), wide) / jnp.sqrt(rank)
    return u.astype(w.dtype), v.astype(w.dtype)


METHODS: dict[str, Method] = {
    "kernel_projection": _kernel_projection,
    "spectral": _spectral,
    "random": _random,
}
