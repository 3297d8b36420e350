"""Stacks of kernels, and how those of many shapes are brought to few by padding: a compiler takes its time for every shape.

A TPU's compiler needs a second or more for the decomposition of one shape, however small, and a network has dozens of them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
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
class Group:
    """Stacks that are padded to one shape.

    Attributes:
      shape: of an element, the largest of every axis.
      members: the stacks' positions in the sequence that was grouped.
    """

    shape: Shape
    members: tuple[int, ...]


def groups(
    shapes: Sequence[Shape],
    counts: Sequence[int],
    work: Callable[[Shape], float],
    alike: Sequence[Hashable] | None = None,
    free: float = FREE,
) -> list[Group]:
    """As few shapes as some more work buys; which they are depends on the shapes alone, not on the platform.

    Args:
      shapes: of the elements of every stack.
      counts: how many elements every stack has.
      work: multiply-accumulates for an element of a shape; growing with every axis.
      alike: only stacks for which this is equal may share a shape.
      free: how much more there may be, besides a tenth of what there is without padding.
    """
    keys = [(shape, alike[i] if alike else None) for i, shape in enumerate(shapes)]
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    merged = [Group(shapes[members[0]], tuple(members)) for members in found.values()]

    def total(group: Group) -> float:
        return sum(counts[i] for i in group.members) * work(group.shape)

    def joined(pair: tuple[Group, Group]) -> tuple[float, Group]:
        one, other = pair
        both = Group(tuple(map(max, one.shape, other.shape)), tuple(sorted(one.members + other.members)))
        return total(both) - total(one) - total(other), both

    left = _SLACK * sum(map(total, merged)) + free
    while True:
        pairs = [pair for pair in itertools.combinations(merged, 2) if _may_join(pair, keys)]
        if not pairs:
            return merged
        cost, both, pair = min(((*joined(pair), pair) for pair in pairs), key=lambda choice: choice[0])
        if cost > left:
            return merged
        left -= cost
        merged = [group for group in merged if group not in pair] + [both]


def _may_join(pair: tuple[Group, Group], keys: Sequence[tuple[Shape, Hashable]]) -> bool:
    one, other = pair
    return keys[one.members[0]][1] == keys[other.members[0]][1]


def padded(array: jax.Array, shape: Shape) -> jax.Array:
    """`[k, *sizes] -> [k, *shape]`, with zeros."""
    return jnp.pad(array, [(0, 0), *((0, new - old) for old, new in zip(array.shape[1:], shape, strict=True))])


def stacked(arrays: Sequence[jax.Array], group: Group) -> jax.Array:
    """The members of a group as one array `[k, *shape]`."""
    return jnp.concatenate([padded(arrays[i], group.shape) for i in group.members])


def split(array: jax.Array, group: Group, counts: Sequence[int] | Mapping[int, int]) -> list[jax.Array]:
    """`stacked` undone, but for the padding: a part `[count, ...]` for every member, by the counts of all stacks."""
    ends = list(itertools.accumulate(counts[i] for i in group.members))
    return [array[end - counts[i] : end] for i, end in zip(group.members, ends, strict=True)]


def in_few_shapes(fn: Callable[..., Any], *stacks: Sequence[jax.Array], sizes: Sequence[np.ndarray] | None = None) -> list[Any]:
    """A function of square matrices of many sizes, compiled for few of them and mapped over the matrices of a size.

    Args:
      fn: `(size, *matrices)` to matrices, all `[p, p]`; `size` says how many rows are no padding.  Of matrices that are zero
        beyond them it has to make, up to there, what it makes of the leading blocks alone.
      *stacks: for every matrix that `fn` takes, stacks `[k, p, p]` of any sizes.
      sizes: of every stack `[k]`, where its matrices are padded already: how many rows are none.

    Returns:
      What `fn` makes of every stack, `[k, p, p]`.
    """
    first = stacks[0]
    counts, shapes = [len(stack) for stack in first], [stack.shape[1:] for stack in first]
    if sizes is None:
        sizes = [np.full(len(stack), stack.shape[1]) for stack in first]
    results: list[Any] = [None] * len(first)
    for group in groups(shapes, counts, lambda shape: float(shape[0]) ** 3, [stack.dtype for stack in first]):
        operands = [stacked(arrays, group) for arrays in stacks]
        rows = jnp.asarray(np.concatenate([sizes[i] for i in group.members]))
        made = jax.lax.map(lambda operands: fn(*operands), (rows, *operands))
        parts = jax.tree.map(lambda leaf, group=group: split(leaf, group, counts), made)
        outer, inner = jax.tree.structure(made), jax.tree.structure([0] * len(group.members))
        for i, part in zip(group.members, jax.tree.transpose(outer, inner, parts), strict=True):
            results[i] = jax.tree.map(lambda leaf, i=i: leaf[:, : shapes[i][0], : shapes[i][1]], part)
    return results
