"""Projection on the leading singular directions, of many kernels at once and compiled for few shapes.

Kernels of like shapes are padded to one and multiplied as a batch; their Gram matrices are decomposed in the few sizes of
`stacks.in_few_shapes`.  What a kernel becomes does not depend on what else is in the batch, but for rounding.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.projection import activations, linalg
from lowrank_jax.projection.activations import Activation
from lowrank_jax.projection.linalg import Pair, lengths, ratio, wide
from lowrank_jax.projection.padding import FREE_IN_PRODUCTS, Group, groups, padded, split, stacked
from lowrank_jax.projection.stack import Stack

_OUTPUTS = 2**11  # whose best lengths are sought at a time, where that takes a series for each; a TPU's compiler minds how many


@dataclasses.dataclass(frozen=True)
class Batch:
    """Stacks of kernels as one, every kernel in a unit of its own.

    Attributes:
      w: `[k, n, m]`, padded with zeros; every matrix measured in its largest element.
      unit: these elements, `[k, 1, 1]`.
      columns: of an output.
      members: the stacks, in the order in which they lie in `w`.
      group: where they were found.
    """

    w: jax.Array
    unit: jax.Array
    columns: int
    members: tuple[Stack, ...]
    group: Group

    @property
    def is_wide(self) -> bool:
        return self.w.shape[1] <= self.w.shape[2]

    @property
    def ranks(self) -> np.ndarray:
        """`[k]`."""
        return np.repeat([stack.rank for stack in self.members], [len(stack.w) for stack in self.members])

    def runs(self) -> list[tuple[Activation, slice]]:
        """Which matrices are followed by which activation."""
        found, start = [], 0
        for stack in self.members:
            found.append((activations.get(stack.activation), slice(start, start + len(stack.w))))
            start += len(stack.w)
        return found

    def unpadded(self, u: jax.Array, v: jax.Array) -> dict[int, Pair]:
        """Factors `[k, n, r]` and `[k, r, m]` as those of the stacks, by their place, in units and dtypes of theirs."""
        root, counts = jnp.sqrt(self.unit), {i: len(stack.w) for i, stack in zip(self.group.members, self.members, strict=True)}
        parts = (split(root * factor, self.group, counts) for factor in (u, v))
        pairs = {}
        for i, stack, u_i, v_i in zip(self.group.members, self.members, *parts, strict=True):
            n, m = stack.w.shape[1:]
            dtype, rank = stack.w.dtype, stack.rank
            pairs[i] = u_i[:, :n, :rank].astype(dtype), v_i[:, :rank, :m].astype(dtype)
        return pairs


def batches(stacks: Sequence[Stack]) -> list[Batch]:
    """Stacks in few shapes."""
    units = [linalg.units(stack.w) for stack in stacks]
    relative = [stack.w.astype(wide(stack.w.dtype)) / unit for stack, unit in zip(stacks, units, strict=True)]
    kinds = list(dict.fromkeys(stack.activation for stack in stacks))
    shapes = [(*stack.w.shape[1:], stack.rank) for stack in stacks]
    made = []
    counts, alike = [len(stack.w) for stack in stacks], [_alike(stack) for stack in stacks]
    for group in groups(shapes, counts, _work, alike, FREE_IN_PRODUCTS):
        # Sorted by activation, so that those of one lie side by side.
        order = tuple(sorted(group.members, key=lambda i: kinds.index(stacks[i].activation)))
        group = Group(group.shape[:2], order)
        members = tuple(stacks[i] for i in order)
        unit = jnp.concatenate([units[i] for i in order])
        made.append(Batch(stacked(relative, group), unit, members[0].group, members, group))
    return made


def _work(shape: tuple[int, ...]) -> float:
    n, m, rank = shape
    return float(n * m) * max(rank, 64)  # at low ranks it is the memory of the padded kernels that matters


def _alike(stack: Stack) -> tuple:
    n, m = stack.w.shape[1:]
    # Where several columns make an output, it is their places that say which.
    return n <= m, wide(stack.w.dtype), stack.group, m if stack.group > 1 else None


@linalg.highest_precision
def project(stacks: Sequence[Stack], *, normalized: bool = False, vectors: Sequence[jax.Array] | None = None) -> list[Pair]:
    """Every kernel on its leading singular directions, its outputs at the lengths of least risk.

    Args:
      stacks: the kernels.
      normalized: lengths are kept instead.
      vectors: `linalg.gram_eigenvectors` of the only stack, `[k, p, p]`, where they are known.

    Returns:
      For every stack u `[k, n, rank]` and v `[k, rank, m]` in the dtype of w, balanced: UᵀU = VVᵀ.
    """
    parts = batches(stacks)
    if vectors is None:
        vectors = linalg.gram_eigenvectors_of_all([stack.w for stack in stacks])
    images = [_images(part, vectors) for part in parts]
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


def _images(part: Batch, vectors: Sequence[jax.Array]) -> jax.Array:
    """What spans the leading left singular directions, `[k, n, rank]`; zero where a rank is padded."""
    side = min(part.w.shape[1:])
    cut = [vectors[i][:, :, : stack.rank] for i, stack in zip(part.group.members, part.members, strict=True)]
    leading = jnp.concatenate([padded(each, (side, part.ranks.max())) for each in cut])
    return leading if part.is_wide else part.w @ leading


def _orthonormalizers(parts: Sequence[Batch], images: Sequence[jax.Array]) -> list[jax.Array]:
    """What makes the images orthonormal, `[k, r, r]`; eigenvectors are, their images under W are only nearly orthogonal."""
    tall = [image for part, image in zip(parts, images, strict=True) if not part.is_wide]
    made = iter(linalg.orthonormalizers([image.mT @ image for image in tall]))

    def unchanged(image: jax.Array) -> jax.Array:
        k, _, r = image.shape
        return jnp.broadcast_to(jnp.eye(r, dtype=image.dtype), (k, r, r))

    return [unchanged(image) if part.is_wide else next(made)[0] for part, image in zip(parts, images, strict=True)]


def at_best_lengths(parts: Sequence[Batch], coordinates: Sequence[jax.Array], normalized: bool) -> list[jax.Array]:
    """Coordinates `[k, r, m]` of projected outputs, each of these brought to the length that serves best.

    One at right angles to the subspace has no direction there; any will do, and it gets the first axis.
    """
    whole = [lengths(part.w, part.columns) for part in parts]
    kept = [lengths(c, part.columns) for part, c in zip(parts, coordinates, strict=True)]
    best = whole if normalized else _best_lengths(parts, whole, kept)
    lengthened = []
    for part, c, old, new in zip(parts, coordinates, kept, best, strict=True):
        old, new = (jnp.tile(length, part.columns)[:, None] for length in (old, new))
        first_axis = jnp.zeros_like(c).at[:, 0, : c.shape[2] // part.columns].set(1)
        direction = jnp.where(old == 0, first_axis, c / jnp.where(old == 0, 1, old))
        lengthened.append(direction * new)
    return lengthened


def _best_lengths(parts: Sequence[Batch], whole: Sequence[jax.Array], kept: Sequence[jax.Array]) -> list[jax.Array]:
    """`[k, outputs]` for every part; all outputs in front of one activation are asked for together."""
    runs = [(act, i, run) for i, part in enumerate(parts) for act, run in part.runs()]
    found: list[dict[int, jax.Array]] = [{} for _ in parts]  # by where a run starts
    for act in dict.fromkeys(act for act, _, _ in runs):
        mine = [(i, run) for other, i, run in runs if other is act]
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
    """Of outputs `[outputs]`; in pieces where there are so many that what a series takes for each would fill the memory."""
    pieces = -(-len(length) // _OUTPUTS)
    if pieces == 1 or isinstance(act, activations.Homogeneous):
        return act.best_length(length, cosine)
    length_, cosine_ = (jnp.pad(part, (0, pieces * _OUTPUTS - len(part))).reshape(pieces, -1) for part in (length, cosine))
    return jax.lax.map(lambda pair: act.best_length(*pair), (length_, cosine_)).ravel()[: len(length)]


def measure(act: Activation, unit: jax.Array) -> jax.Array:
    """In what to tell an activation lengths that were measured in `unit`: to a homogeneous one all units are the same."""
    return jnp.ones_like(unit) if isinstance(act, activations.Homogeneous) else unit
