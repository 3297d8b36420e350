"""What a kernel's projection loses at every rank at once, from one decomposition, on the host in float64.

In the leading left singular vectors an output j keeps c_j(r) = Σ_{i≤r} (σ_i B_ji)² of its squared length.  So the cosines of
all ranks are a cumulative sum, and each says what is lost of the output's function (docs/mathematics.md, section 12).  Of a
Gaussian kernel the terms of these sums can be drawn, without a matrix.

Nothing is compiled for a shape: only an activation's table, once.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lowrank_jax.projection import activations, linalg
from lowrank_jax.projection.activations import Activation, ActivationLike
from lowrank_jax.projection.batched import measure
from lowrank_jax.text import did_you_mean

# What a normalisation right behind makes the outputs' lengths: `each` has its own statistic, so that all become equal, or all
# have one `together`, and keep their proportions.
Normalization = Literal["each", "together"]


class Curves(NamedTuple):
    """By rank, from 1 to full rank: `[min(n, m)]`, float64.

    Attributes:
      risk: R(r) / R(0) of the kernel projection, falling to 0.
      correlation: the squared correlation of the outputs with those of the dense layer, rising to 1.  The outputs' means, which
        a bias holds, do not count.
      energy: the share of the squared singular values, rising to 1.
    """

    risk: np.ndarray
    correlation: np.ndarray
    energy: np.ndarray


def curves(w: Any, *, activation: ActivationLike = "relu", group: int = 1, normalized: Normalization | None = None) -> Curves:
    """Of a kernel in its leading singular subspace at every rank.

    Args:
      w: `[n, m]`, with values: it is decomposed on the host.
      activation, group: as in `kernel_projection`.
      normalized: the normalisation that follows: of `each` output by itself, which then counts as much as any other, or of
        all `together`, as in LayerNorm, whose mean square becomes 1; None for none.

    Raises:
      ValueError: as in `kernel_projection`, there is no such normalisation, or `w` is traced.
    """
    if normalized is not None and normalized not in get_args(Normalization):
        raise ValueError(f"unknown normalisation {normalized!r}{did_you_mean(str(normalized), get_args(Normalization))}")
    linalg.check_matrix(w)
    linalg.check_group(w, group)
    if isinstance(w, Tracer):
        raise ValueError("curves need the kernel's values, which a traced array does not have")
    w = np.asarray(w, np.float64)
    unit = _unit(w)
    act = activations.get(activation)
    with jax.ensure_compile_time_eval():  # numbers are known under an outer jit too
        size = float(measure(act, jnp.float32(unit)))
    return _of_squares(_squares(w / unit, group), act, normalized, size)


def gaussian_curves(
    n: int, m: int, *, activation: ActivationLike = "relu", group: int = 1, normalized: Normalization | None = None
) -> Curves:
    """Of a Gaussian kernel `[n, m]` whose outputs have length one; from its shape alone, always the same."""
    return _of_squares(_gaussian_squares(n, m, group), activations.get(activation), normalized, 1.0)


def _unit(w: np.ndarray) -> float:
    """A power of four near the largest magnitude; 1 if all are zero."""
    largest = np.abs(w).max()
    return 4.0 ** np.round(np.log2(largest) / 2) if largest > 0 else 1.0


# An output that is so much shorter than the longest one is rounding, or of dead weights: it does not count.
_ABSENT = 1e-13
# Of the whole energy: of outputs with less, the eigenvalues of a Gram matrix, which are squares, know too little.
_SMALL = 1e-8


def _squares(w: np.ndarray, group: int) -> np.ndarray:
    """(σ_i B_ji)², of every singular vector and output: `[p, outputs]`, by decreasing singular value; 0 of absent outputs."""

    def of_outputs(squares: np.ndarray) -> np.ndarray:
        return squares if group == 1 else squares.reshape(len(squares), group, -1).sum(axis=1)

    energy = of_outputs(np.square(w).sum(axis=0, keepdims=True))[0]
    present = energy > _ABSENT**2 * energy.max()
    if energy.min(where=present, initial=np.inf) < _SMALL * energy.sum():
        squares = _squares_of_small(w)
    elif len(w) < w.shape[1]:
        _, vectors = np.linalg.eigh(w @ w.T)
        squares = np.square(vectors.T[::-1] @ w)
    else:
        values, vectors = np.linalg.eigh(w.T @ w)
        squares = np.square(vectors.T[::-1], order="C")
        squares *= np.maximum(values, 0)[::-1, None]
    squares = of_outputs(squares)
    squares[:, ~present] = 0
    return squares


def _squares_of_small(w: np.ndarray) -> np.ndarray:
    """The same of columns of very different lengths: a product with the columns rounds each in proportion to its own."""
    if len(w) > w.shape[1]:
        w = np.asarray(np.linalg.qr(w, mode="r"))
    vectors, _, _ = np.linalg.svd(w, full_matrices=False)
    return np.square(vectors.T @ w)


_DRAWN = 512  # outputs


def _gaussian_squares(n: int, m: int, group: int) -> np.ndarray:
    """The same of outputs of a Gaussian kernel: `[p, drawn]`.

    Its singular vectors are uniformly distributed: an output's coordinates are Gaussian numbers, divided by their length.  All
    shapes have the same ones, so that chance hardly matters when they are compared.
    """
    p, q = min(n, m), max(n, m)
    draw = np.random.default_rng(0)
    coordinates = draw.chisquare(group, (p, _DRAWN))
    coordinates *= group / coordinates.mean(axis=1, keepdims=True)  # singular vectors have length one
    length = coordinates.sum(axis=0) + (draw.chisquare(group * (m - p), _DRAWN) if m > p else 0)
    return q / n * _marchenko_pastur(p, q)[:, None] * coordinates / length


def _marchenko_pastur(p: int, q: int) -> np.ndarray:
    """The eigenvalues of the smaller Gram matrix of p x q standard Gaussian numbers, over q: quantiles, `[p]`, decreasing."""
    middle, half = 1 + p / q, 2 * np.sqrt(p / q)
    angle = (np.arange(4096) + 0.5) * np.pi / 4096
    x = middle + half * np.cos(angle)  # the density is √((high - x)(x - low)) / x
    share = np.cumsum(np.sin(angle) ** 2 / x)
    return np.interp((np.arange(p) + 0.5) / p, share / share[-1], x)


_BLOCK = 2**17  # ranks times outputs that are evaluated at a time


def _of_squares(squares: np.ndarray, act: Activation, normalized: Normalization | None, unit: float) -> Curves:
    kept = np.cumsum(squares, axis=0)
    whole = kept[-1]
    size = _sizes(np.sqrt(whole), normalized, unit)
    table = _Table.of(act, size)
    found = Curves(*(np.empty(len(kept)) for _ in Curves._fields))
    step = max(_BLOCK // len(whole), 1)
    for ranks in (slice(start, start + step) for start in range(0, len(kept), step)):
        # Of its own sum, so that nothing is lost at full rank.
        share = np.divide(kept[ranks], whole, out=np.zeros_like(kept[ranks]), where=whole > 0)
        lost, correlation = table.read(np.sqrt(share))
        found.risk[ranks] = _mean(lost, table.risk)
        found.correlation[ranks] = 1 - _mean(1 - correlation**2, table.variance)
        found.energy[ranks] = 1 - _mean(1 - share, whole)
    return found


def _sizes(length: np.ndarray, normalized: Normalization | None, unit: float) -> np.ndarray:
    """How long the activation finds each output's column."""
    present = length > 0
    if normalized == "each":
        return present.astype(np.float64)
    if normalized == "together":
        return length / np.sqrt((length**2).sum() / present.sum()) if present.any() else length
    return length * unit


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Over outputs: `[ranks, outputs]` to `[ranks]`; of a zero kernel nothing is lost."""
    total = weights.sum()
    return values @ (weights / total) if total > 0 else np.zeros(len(values))


# Of a homogeneous activation one length is enough.  Of all others there are lengths by octaves, and cosines by 128ths.
_COSINES, _COSINES_OF_ONE_LENGTH = 129, 2**14 + 1
_PER_OCTAVE, _OCTAVES = 3, 16  # further below the largest length a column does not matter
_AT_A_TIME = 4  # lengths


class _Rows(NamedTuple):
    """What outputs of some lengths lose: `[lengths]` and `[lengths, cosines]`.

    Attributes:
      risk, variance: at a cosine of 0, over the squared length: the risk of nothing, and of an output of the same length.
      lost: the share of the risk that is left at the best length.
      correlation: that is kept.
    """

    risk: np.ndarray
    variance: np.ndarray
    lost: np.ndarray
    correlation: np.ndarray


class _Table(NamedTuple):
    """What every output loses, read linearly in the logarithm of its length and in its cosine.

    Attributes:
      risk, variance: of every output, `[outputs]`.
      lost, correlation: by cosine, `[outputs, cosines]`, or `[1, cosines]` where all outputs have the same.
    """

    risk: np.ndarray
    variance: np.ndarray
    lost: np.ndarray
    correlation: np.ndarray

    @classmethod
    def of(cls, act: Activation, size: np.ndarray) -> "_Table":
        """For outputs of sizes `[outputs]`."""
        present = size > 0
        if isinstance(act, activations.Homogeneous) or not present.any():
            place = np.zeros(1)
        else:
            place = _PER_OCTAVE * np.log2(size, out=np.full_like(size, -np.inf), where=present)
            place = np.maximum(place, place.max() - _PER_OCTAVE * _OCTAVES)
            place = place[:1] if (place == place[0]).all() else place
        low = np.floor(place)
        part = place - low
        steps, at = np.unique(np.concatenate([low, low + (part > 0)]).astype(int), return_inverse=True)
        rows = _rows(act, tuple(map(int, steps)))
        lower, upper = np.split(at, 2)

        def between(values: np.ndarray) -> np.ndarray:
            weight = part if values.ndim == 1 else part[:, None]
            return values[lower] * (1 - weight) + values[upper] * weight

        # Powers of the length are read exactly.
        risk, variance = (np.exp(between(np.log(np.maximum(whole, 1e-37)))) * size**2 for whole in rows[:2])
        return cls(risk, variance, between(rows.lost), between(rows.correlation))

    def read(self, cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`lost` and `correlation` at cosines `[ranks, outputs]`."""
        outputs, count = self.lost.shape
        place = np.minimum(cosine, 1) * (count - 1)
        low = np.minimum(place.astype(np.int64), count - 2)
        part = place - low
        low += count * np.arange(outputs)

        def at(table: np.ndarray) -> np.ndarray:
            values = table.ravel()
            found = values.take(low)
            return found + part * (values.take(low + 1) - found)

        return at(self.lost), at(self.correlation)


@functools.lru_cache(maxsize=64)
def _rows(act: Activation, steps: tuple[int, ...]) -> _Rows:
    """Of the lengths at some steps of the logarithm."""
    rows = [_known(act, start)[step - start] for step in steps for start in [step // _AT_A_TIME * _AT_A_TIME]]
    return _Rows(*map(np.stack, zip(*rows, strict=True)))


@functools.lru_cache(maxsize=1024)
def _known(act: Activation, start: int) -> list[tuple[np.ndarray, ...]]:
    """Of the lengths from a step on."""
    lengths = 2.0 ** ((start + np.arange(_AT_A_TIME)) / _PER_OCTAVE)
    with jax.ensure_compile_time_eval():  # numbers are known under an outer jit too
        parts = [np.asarray(part, np.float64) for part in _shares(act, lengths.astype(np.float32))]
    return list(zip(*parts, strict=True))


@functools.partial(jax.jit, static_argnames="act")
def _shares(act: Activation, lengths: jax.Array) -> _Rows:
    one = isinstance(act, activations.Homogeneous)
    cosine = jnp.linspace(0, 1, _COSINES_OF_ONE_LENGTH if one else _COSINES, dtype=lengths.dtype)

    def of(length: jax.Array) -> tuple[jax.Array, ...]:
        nothing, size = jnp.zeros_like(length), jnp.full_like(cosine, length)
        whole, variance = act.risk(length, nothing, nothing), act.risk(length, length, nothing)
        lost = linalg.ratio(act.risk(size, act.best_length(size, cosine), cosine), whole)
        kept = 1 - linalg.ratio(act.risk(size, size, cosine), variance)
        return whole / length**2, variance / length**2, lost, kept

    return _Rows(*jax.lax.map(of, lengths))  # type: ignore[arg-type]
