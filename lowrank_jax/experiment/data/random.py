"""Random bits that depend on the seed, the epoch and the example's index alone."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_bits(seed: int, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
    """64 random bits for each example: splitmix64 over (seed, epoch, index), vectorised."""
    x = _splitmix64(np.full(index.shape, seed, np.uint64))
    x = _splitmix64(x ^ epochs.astype(np.uint64))
    return _splitmix64(x ^ index.astype(np.uint64))


def uniforms(bits: np.ndarray, count: int, *, skip: int = 0) -> np.ndarray:
    """Numbers in [0, 1), `[*bits.shape, count]`: the outputs of splitmix64 from the state `bits`, after the first `skip`."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64, also of scalars
        state = bits[..., None] + _GOLDEN * np.arange(1 + skip, 1 + skip + count, dtype=np.uint64)
    return (_splitmix64(state) >> np.uint64(11)) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea and Flood (OOPSLA 2014); arithmetic modulo 2**64 is intended."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
