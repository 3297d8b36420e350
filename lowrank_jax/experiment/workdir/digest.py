"""Checksums of arrays, computed where the arrays live."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.paths import named_leaves

_SALTS = (0x9E3779B9, 0x7F4A7C15)


def digests(tree: Any) -> dict[str, str]:
    """A 64-bit digest of every array of a tree by name, as 16 hexadecimal digits.

    A digest is a sum of mixed words modulo 2**32, twice with different salts.  It does not depend on the sharding of an array,
    and changing a single element always changes it.
    """
    # One program: where several processes share arrays, many that are not waited for can block each other.
    words = jax.device_get(_digest_words(named_leaves(tree)))
    return {name: "".join(f"{int(word):08x}" for word in pair) for name, pair in words.items()}


@jax.jit
def _digest_words(leaves: dict[str, jax.Array]) -> dict[str, list[jax.Array]]:
    return {name: [_digest(leaf, salt) for salt in _SALTS] for name, leaf in leaves.items()}


def _digest(x: jax.Array, salt: int) -> jax.Array:
    words = _as_words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words ^ _mix(place + jnp.uint32(salt))), dtype=jnp.uint32)


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
