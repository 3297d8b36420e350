"""Projection on the leading singular directions, of many kernels at once and compiled for few shapes.

Kernels of similar shapes are padded to one shape and multiplied as one stack (see padding.py).  The result for a kernel does
not depend on the other kernels, except for rounding.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.projection import activations, linalg
from lowrank_jax.projection.activations import Activation
from lowrank_jax.projection.linalg import Pair, lengths, ratio, wide
from lowrank_jax.projection.padding import FREE_IN_PRODUCTS, Bucket, buckets
from lowrank_jax.projection.stack import Stack

_OUTPUTS = 2**11  # best lengths sought at a time, where each takes a series; more take a TPU's compiler long


@dataclasses.dataclass(frozen=True)
class PaddedStack:
    """Stacks of kernels as one, every kernel in a unit of its own.

    Attributes:
      w: `[k, n, m]`, padded with zeros; every matrix is divided by its unit.
      unit: the unit of every matrix, near its largest magnitude, `[k, 1, 1]`.
      group: columns per output, the same for all of them.
      members: the stacks, in the order in which they lie in `w`.
      bucket: their positions and counts.
    """

    w: jax.Array
    unit: jax.Array
    group: int
    members: tuple[Stack, ...]
    bucket: Bucket

    @property
    def is_wide(self) -> bool:
        return self.w.shape[1] <= self.w.shape[2]

    @property
    def ranks(self) -> np.ndarray:
        """`[k]`."""
        return np.repeat([stack.rank for stack in self.members], self.bucket.counts)

    @property
    def sides(self) -> np.ndarray:
        """The smaller size of every matrix without padding, `[k]`."""
        return np.repeat([min(stack.w.shape[1:]) for stack in self.members], self.bucket.counts)

    def runs(self) -> list[tuple[Activation, slice]]:
        """Which matrices are followed by which activation."""
        found, start = [], 0
        for stack, count in zip(self.members, self.bucket.counts, strict=True):
            found.append((activations.get(stack.activation), slice(start, start + count)))
            start += count
        return found

    def unpadded(self, u: jax.Array, v: jax.Array) -> dict[int, Pair]:
        """Factors `[k, n, r]` and `[k, r, m]` by their stack's position, in the stack's own units, shape and dtype."""
        root = jnp.sqrt(self.unit)
        parts = zip(self.bucket.members, self.members, self.bucket.split(root * u), self.bucket.split(root * v), strict=True)
        pairs = {}
        for i, stack, u_i, v_i in parts:
            n, m = stack.w.shape[1:]
            dtype, rank = stack.w.dtype, stack.rank
            pairs[i] = u_i[:, :n, :rank].astype(dtype), v_i[:, :rank, :m].astype(dtype)
        return pairs


def padded_stacks(stacks: Sequence[Stack]) -> list[PaddedStack]:
    """Stacks in few shapes."""
    units = [linalg.units(stack.w) for stack in stacks]
    relative = [stack.w.astype(wide(stack.w.dtype)) / unit for stack, unit in zip(stacks, units, strict=True)]
    kinds = list(dict.fromkeys(stack.activation for stack in stacks))
    shapes, counts = [stack.w.shape[1:] for stack in stacks], [len(stack.w) for stack in stacks]
    made = []
    for found in buckets(shapes, counts, _work, [_alike(stack) for stack in stacks], FREE_IN_PRODUCTS):
        # Sorted by activation, so that kernels with the same one are contiguous.
        order = tuple(sorted(found.members, key=lambda i: kinds.index(stacks[i].activation)))
        bucket = Bucket(found.shape, order, tuple(counts[i] for i in order))
        members = tuple(stacks[i] for i in order)
        unit = jnp.concatenate([units[i] for i in order])
        made.append(PaddedStack(bucket.stacked(relative), unit, members[0].group, members, bucket))
    return made


def _work(shape: tuple[int, ...]) -> float:
    """Of the Gram matrix, the largest product; for small matrices it is the memory of the padding that matters."""
    n, m = shape
    return float(n * m) * max(min(n, m), 64)


def _alike(stack: Stack) -> tuple:
    n, m = stack.w.shape[1:]
    # Where several columns feed an output, their positions say which.
    return n <= m, wide(stack.w.dtype), stack.group, m if stack.group > 1 else None


@linalg.highest_precision
def project(stacks: Sequence[Stack], *, normalized: bool = False, vectors: jax.Array | None = None) -> list[Pair]:
    """Projects every kernel on its leading singular directions, each output at its length of least risk.

    Args:
      stacks: the kernels.
      normalized: keep every output's length instead.
      vectors: `linalg.gram_eigenvectors` of the only stack, `[k, p, p]`, where they are known.

    Returns:
      For every stack u `[k, n, rank]` and v `[k, rank, m]` in the dtype of w, balanced: UᵀU = VVᵀ.
    """
    parts = padded_stacks(stacks)
    if vectors is None:
        sides, ranks = (
            [jnp.asarray(sizes) for sizes in each] for each in zip(*((p.sides, p.ranks) for p in parts), strict=True)
        )
        spans = linalg.singular_vectors([part.w for part in parts], sides, ranks)
    else:
        spans = [vectors]
    images = [_images(part, span) for part, span in zip(parts, spans, strict=True)]
    bases = _orthonormalizers(parts, images)
    coordinates = []
    for part, image, basis in zip(parts, images, bases, strict=True):
        c = image.mT @ part.w
        coordinates.append(c if part.is_wide else basis.mT @ c)
    balanced = linalg.balancers(at_best_lengths(parts, coordinates, normalized), bases, [part.ranks for part in parts])
    pairs: dict[int, Pair] = {}
    for part, image, (turn, v) in zip(parts, images, balanced, strict=True):
        pairs |= part.unpadded(image @ turn, v)
    return [pairs[i] for i in range(len(stacks))]


def _images(part: PaddedStack, vectors: jax.Array) -> jax.Array:
    """Columns that span the leading left singular directions, `[k, n, rank]`; zero where a rank is padded."""
    highest = part.ranks.max()
    leading = jnp.where(np.arange(highest) < part.ranks[:, None, None], vectors[:, :, :highest], 0)
    return leading if part.is_wide else part.w @ leading


def _orthonormalizers(parts: Sequence[PaddedStack], images: Sequence[jax.Array]) -> list[jax.Array]:
    """What makes the images orthonormal, `[k, r, r]`: eigenvectors already are, their images under W only nearly."""
    tall = [image for part, image in zip(parts, images, strict=True) if not part.is_wide]
    made = iter(linalg.orthonormalizers([image.mT @ image for image in tall]))

    def unchanged(image: jax.Array) -> jax.Array:
        k, _, r = image.shape
        return jnp.broadcast_to(jnp.eye(r, dtype=image.dtype), (k, r, r))

    return [unchanged(image) if part.is_wide else next(made)[0] for part, image in zip(parts, images, strict=True)]


def at_best_lengths(parts: Sequence[PaddedStack], coordinates: Sequence[jax.Array], normalized: bool) -> list[jax.Array]:
    """Coordinates `[k, r, m]` of projected outputs, each scaled to its best length.

    An output orthogonal to the subspace has no direction in it: it gets the first axis, which is as good as any.
    """
    whole = [lengths(part.w, part.group) for part in parts]
    kept = [lengths(c, part.group) for part, c in zip(parts, coordinates, strict=True)]
    best = whole if normalized else _best_lengths(parts, whole, kept)
    lengthened = []
    for part, c, old, new in zip(parts, coordinates, kept, best, strict=True):
        old, new = (jnp.tile(length, part.group)[:, None] for length in (old, new))
        first_axis = jnp.zeros_like(c).at[:, 0, : c.shape[2] // part.group].set(1)
        direction = jnp.where(old == 0, first_axis, c / jnp.where(old == 0, 1, old))
        lengthened.append(direction * new)
    return lengthened


def _best_lengths(parts: Sequence[PaddedStack], whole: Sequence[jax.Array], kept: Sequence[jax.Array]) -> list[jax.Array]:
    """`[k, outputs]` for every part; all outputs before one activation are computed together."""
    runs = [(act, i, run) for i, part in enumerate(parts) for act, run in part.runs()]
    found: list[dict[int, jax.Array]] = [{} for _ in parts]  # by where a run starts
    for act in dict.fromkeys(act for act, _, _ in runs):
        mine = [(i, run) for other, i, run in runs if other == act]  # two may be made of one function
        units = [jnp.broadcast_to(measure(act, parts[i].unit[run, 0]), whole[i][run].shape) for i, run in mine]
        length, unit = _flat([whole[i][run] for i, run in mine]), _flat(units)
        cosine = jnp.minimum(ratio(_flat([kept[i][run] for i, run in mine]), length), 1)
        best, start = _best_length(act, length * unit, cosine) / unit, 0
        for i, run in mine:
            shape = whole[i][run].shape
            found[i][run.start] = best[start : start + shape[0] * shape[1]].reshape(shape)
            start += shape[0] * shape[1]
    return [jnp.concatenate([pieces[start] for start in sorted(pieces)]) for pieces in found]


def _flat(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([array.ravel() for array in arrays])


def _best_length(act: Activation, length: jax.Array, cosine: jax.Array) -> jax.Array:
    """For outputs `[outputs]`; in pieces where the series of all of them would fill the memory."""
    pieces = -(-len(length) // _OUTPUTS)
    if pieces == 1 or isinstance(act, activations.Homogeneous):
        return act.best_length(length, cosine)
    length_, cosine_ = (jnp.pad(part, (0, pieces * _OUTPUTS - len(part))).reshape(pieces, -1) for part in (length, cosine))
    return jax.lax.map(lambda pair: act.best_length(*pair), (length_, cosine_)).ravel()[: len(length)]


_SMALLEST, _LARGEST = 2.0**-12, 2.0**16


def measure(act: Activation, unit: jax.Array) -> jax.Array:
    """The unit in which to pass lengths to an activation: for a homogeneous one it does not matter.

    Any other is treated as homogeneous outside these bounds.  Below them its values are lost in rounding, above them squares
    overflow (docs/mathematics.md, section 4).
    """
    return jnp.ones_like(unit) if isinstance(act, activations.Homogeneous) else jnp.clip(unit, _SMALLEST, _LARGEST)
