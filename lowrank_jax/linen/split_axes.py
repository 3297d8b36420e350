"""Where the elements of some axes of an array are, as it changes its shape."""

import math
from collections.abc import Sequence

Split = tuple[int, ...]  # along each axis, how many of these elements it has: its size, one, or a factor of its size


def after_broadcast(split: Split, dimensions: Sequence[int], axes: int) -> Split:
    """In an array of so many axes, of which the old ones are `dimensions`."""
    found = [1] * axes
    for axis, size in zip(dimensions, split, strict=True):
        found[axis] = size
    return tuple(found)


def after_reshape(split: Split, before: Sequence[int], after: Sequence[int]) -> Split | None:
    """The split of a reshaped array; None where an axis does not say which of its elements they are."""
    found: list[int] = []
    for old, new in _blocks(before, after):
        start = len(found)
        elements = math.prod(split[axis] for axis in old)
        sizes = [after[axis] for axis in new]
        inner = _inner([before[axis] for axis in old], [split[axis] for axis in old])
        if inner is None:
            return None
        for size in reversed(sizes):
            share = math.gcd(size, elements)
            if share not in (size, elements):
                return None
            found.insert(start, share)
            elements //= share
        if elements > 1:
            return None
    return tuple(found)


def _inner(sizes: Sequence[int], split: Sequence[int]) -> bool | None:
    """Whether the elements are the innermost ones of these axes; None if not."""
    outside = False
    for size, part in zip(reversed(sizes), reversed(split), strict=True):
        if outside and part > 1:
            return None
        outside = outside or part < size
    return True


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The old and new axes of a reshape in the smallest groups of equal products."""
    blocks: list[tuple[list[int], list[int]]] = []
    old, new = 0, 0
    while old < len(before) or new < len(after):
        first, second = old, new
        size, other = 1, 1
        while True:
            if size == other and (old > first or new > second):
                break
            if (size <= other and old < len(before)) or new == len(after):
                size *= before[old]
                old += 1
            else:
                other *= after[new]
                new += 1
        blocks.append((list(range(first, old)), list(range(second, new))))
    return blocks
