"""Checksums of arrays, computed where the arrays live."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.experiment.hosts.processes import several
from lowrank_jax.paths import named_leaves

_SALTS = (0x9E3779B9, 0x7F4A7C15)


def digests(tree: Any) -> dict[str, str]:
    """A 64-bit digest of every array of a tree by name, as 16 hexadecimal digits.

    A digest is a sum of mixed words modulo 2**32, twice with different salts.  It does not depend on the sharding of an array,
    and changing a single element always changes it.
    """
    words = {}
    for name, leaf in named_leaves(tree).items():
        words[name] = _digest(leaf)  # a program for each shape: one for the tree takes long to compile
        if several():  # whose programs could wait for each other if they ran in another order elsewhere
            words[name].block_until_ready()
    return {name: "".join(f"{word:08x}" for word in pair.tolist()) for name, pair in jax.device_get(words).items()}


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """`[salts]`"""
    words = _as_words(x)[..., None]
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    salted = place + jnp.asarray(_SALTS, jnp.uint32)
    return jnp.sum(_mix(words ^ _mix(salted)), axis=tuple(range(x.ndim)), dtype=jnp.uint32)


def _as_words(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3: a bijection, so one changed word is one changed summand."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
