"""Plans of one scale for all kernels, which every other one is held against."""

from collections.abc import Sequence

import numpy as np

from lowrank_jax.planning import knapsack
from lowrank_jax.planning.options import Points, rule_of
from lowrank_jax.planning.plans import PlannedKernel
from lowrank_jax.planning.rules import rank_at

_SCALES = [scale / 200 for scale in range(1, 201)]  # uniform plans that are candidates


def uniforms(kernels: Sequence[PlannedKernel], points: Sequence[Points]) -> list[list[int]]:
    """The plans of uniform scales, as `plan` makes them, within the rules' bounds; in either execution."""
    by_kernel = [_uniform(kernel, of_kernel, _SCALES) for kernel, of_kernel in zip(kernels, points, strict=True)]
    return [list(chosen) for chosen in dict.fromkeys(zip(*by_kernel, strict=True))]


def largest_uniform(
    kernels: Sequence[PlannedKernel], points: Sequence[Points], options: Sequence[knapsack.Options], limits: np.ndarray
) -> list[int] | None:
    """The plan of the largest scale that fits, in either execution; None if none does."""
    found: list[tuple[float, list[int]]] = []
    for last in (False, True):
        low, high, scale = 0.0, 1.0, 1.0
        for _ in range(40):  # to far less than a rank
            both = [_uniform(kernel, of_kernel, (scale,)) for kernel, of_kernel in zip(kernels, points, strict=True)]
            chosen = [ways[last] for ways in both]
            if (knapsack.total_cost(options, chosen) <= limits).all():
                low = scale
                found.append((scale, chosen))
            else:
                high = scale
            scale = (low + high) / 2
    return max(found, key=lambda pair: pair[0], default=(0.0, None))[1]


def _uniform(kernel: PlannedKernel, points: Points, scales: Sequence[float]) -> list[int]:
    """A kernel's options at some scales, in its rule's own scheme if that is open; in the first execution, then in the last."""
    place = 0 if (points.choice == 0).any() else int(points.choice.max())
    own, dense = np.flatnonzero((points.choice == place) & (points.rank > 0)), np.flatnonzero(points.rank == 0)
    if not len(own):
        return [int(dense[0])] * (2 * len(scales))
    view = kernel.choices[place].view
    wanted = np.array([rank_at(rule_of(kernel), view, float(scale)) for scale in scales])
    ranks, first, count = np.unique(points.rank[own], return_index=True, return_counts=True)
    nearest = np.maximum(np.searchsorted(ranks, wanted, side="right") - 1, 0)
    saves = wanted * (view.n + view.m) < view.n * view.m
    options = [own[first[nearest]], own[(first + count - 1)[nearest]]]  # of a rank, executions follow each other
    return [int(option) for each in options for option in (np.where(saves, each, dense[0]) if len(dense) else each)]
