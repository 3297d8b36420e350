"""Pads stacks of matrices to few shapes, because each shape is compiled on its own.

A TPU's compiler needs a second or more for the decomposition of one shape, however small, and a network has dozens of them.

All grouping on the way from kernels to factors is decided here, at three prices:

* Kernels that are equal in shape and settings become one `Stack`, without padding: `equal` (planning/factorize.py).
* Stacks become `PaddedStack`s for their products, whose work grows like n m p: `buckets` at `FREE_IN_PRODUCTS` (batched.py).
* Their Gram matrices are decomposed, whose work grows like p³ with a large constant: `in_few_shapes` at `FREE`.

One grouping for the last two would decompose 64x64 matrices as 256x256 ones, or compile products for every size of matrix.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]

# Multiply-accumulates that are not worth a shape of their own: of decompositions, which take many for each, and of products,
# where a core does so many in some hundredths of a second.
FREE = 2e7
FREE_IN_PRODUCTS = 1.5e9
_SLACK = 0.1


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Stacks that are padded to one shape.

    Attributes:
      shape: of a matrix, the largest size on every axis.
      members: the stacks' positions in the sequence that was grouped.
      counts: how many matrices each member has.
    """

    shape: Shape
    members: tuple[int, ...]
    counts: tuple[int, ...]

    def stacked(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """The members among `arrays`, padded with zeros, as one array `[k, *shape]`."""
        return jnp.concatenate([padded(arrays[i], self.shape) for i in self.members])

    def split(self, array: jax.Array) -> list[jax.Array]:
        """The inverse of `stacked` except for the padding: every member's part, `[count, ...]`."""
        ends = itertools.accumulate(self.counts)
        return [array[end - count : end] for count, end in zip(self.counts, ends, strict=True)]


def equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """The positions of equal keys together, in the order in which each key first appears."""
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def buckets(
    shapes: Sequence[Shape],
    counts: Sequence[int],
    work: Callable[[Shape], float],
    alike: Sequence[Hashable] | None = None,
    free: float = FREE,
) -> list[Bucket]:
    """Stacks in as few shapes as a little more work buys; the result depends on the shapes alone, not on the platform.

    Args:
      shapes: the shape of every stack's matrices.
      counts: how many matrices every stack has.
      work: multiply-accumulates for a matrix of a shape; must grow along every axis.
      alike: only stacks with equal values here may share a shape.
      free: how much work may be added, besides a tenth of what there is without padding.
    """
    keys = [(shape, alike[i] if alike else None) for i, shape in enumerate(shapes)]
    found = [Bucket(shapes[members[0]], tuple(members), tuple(counts[i] for i in members)) for members in equal(keys)]
    kinds = {i: keys[bucket.members[0]][1] for i, bucket in enumerate(found)}
    return _merged(found, kinds, work, free)


def _merged(found: list[Bucket], kinds: dict[int, Hashable], work: Callable[[Shape], float], free: float) -> list[Bucket]:
    """Joins the two buckets of one kind that cost least, again and again, until what may be added is spent.

    A heap holds the cost of every pair, so that n buckets take about n² log n steps.  Of equal costs the first pair counts; a
    joined bucket comes last.
    """
    merged = dict(enumerate(found))
    totals = {i: sum(bucket.counts) * work(bucket.shape) for i, bucket in merged.items()}
    left = _SLACK * sum(totals.values()) + free
    pairs: list[tuple[float, int, int]] = []

    def offer(one: int, other: int) -> None:
        if kinds[one] == kinds[other]:
            cost = _total(merged[one], merged[other], work) - totals[one] - totals[other]
            if cost <= left:  # what is left never grows
                heapq.heappush(pairs, (cost, one, other))

    for pair in itertools.combinations(merged, 2):
        offer(*pair)
    while pairs:
        cost, one, other = heapq.heappop(pairs)
        if one not in merged or other not in merged:
            continue
        if cost > left:
            break
        left -= cost
        new = len(kinds)
        kinds[new], totals[new] = kinds[one], _total(merged[one], merged[other], work)
        both = _joined(merged.pop(one), merged.pop(other))
        merged[new] = both
        for old in list(merged)[:-1]:
            offer(old, new)
    return list(merged.values())


def _total(one: Bucket, other: Bucket, work: Callable[[Shape], float]) -> float:
    """The work of two buckets in one shape."""
    return (sum(one.counts) + sum(other.counts)) * work(tuple(map(max, one.shape, other.shape)))


def _joined(one: Bucket, other: Bucket) -> Bucket:
    counts = dict(zip(one.members + other.members, one.counts + other.counts, strict=True))
    members = tuple(sorted(counts))
    return Bucket(tuple(map(max, one.shape, other.shape)), members, tuple(counts[i] for i in members))


def padded(array: jax.Array, shape: Shape) -> jax.Array:
    """`[k, *sizes] -> [k, *shape]`, with zeros."""
    return jnp.pad(array, [(0, 0), *((0, new - old) for old, new in zip(array.shape[1:], shape, strict=True))])


def in_few_shapes(fn: Callable[..., Any], *stacks: Sequence[jax.Array], sizes: Sequence[Any] | None = None) -> list[Any]:
    """Maps a function over square matrices of many sizes, compiled for few of them.

    Args:
      fn: `(size, *matrices)` to matrices, `[p, p]` or `[p, 1]`, of matrices `[p, p]`; rows from `size` on are padding.  Given
        matrices that are zero there, its results must have in their leading blocks what it makes of the leading blocks alone.
      *stacks: for every matrix that `fn` takes, stacks `[k, p, p]` of any sizes.
      sizes: where matrices are padded already, how many rows of each are not padding: `[k]` for every stack.

    Returns:
      For every stack what `fn` makes of its matrices, `[k, p, p]` or `[k, p, 1]`.
    """
    first = stacks[0]
    counts, shapes = [len(stack) for stack in first], [stack.shape[1:] for stack in first]
    if sizes is None:
        sizes = [np.full(len(stack), stack.shape[1]) for stack in first]
    results: list[Any] = [None] * len(first)
    for bucket in buckets(shapes, counts, lambda shape: float(shape[0]) ** 3, [stack.dtype for stack in first]):
        operands = [bucket.stacked(arrays) for arrays in stacks]
        rows = jnp.concatenate([jnp.asarray(sizes[i]) for i in bucket.members])
        made = jax.lax.map(lambda operands: fn(*operands), (rows, *operands))
        leaves, structure = jax.tree.flatten(made)
        for i, *parts in zip(bucket.members, *map(bucket.split, leaves), strict=True):
            p = shapes[i][0]
            results[i] = jax.tree.unflatten(structure, [part[:, :p, :p] for part in parts])
    return results
