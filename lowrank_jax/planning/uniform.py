"""Plans of one scale for all kernels, which every other one is held against."""

from collections.abc import Callable, Sequence

import numpy as np

from lowrank_jax.planning import knapsack
from lowrank_jax.planning.options import Points, rule_of
from lowrank_jax.planning.plans import PlannedKernel
from lowrank_jax.planning.rules import rank_at

_SCALES = [scale / 200 for scale in range(1, 201)]  # uniform plans that are candidates


def uniforms(kernels: Sequence[PlannedKernel], points: Sequence[Points]) -> list[list[int]]:
    """The plans of uniform scales, as `plan` makes them, within the rules' bounds; in either execution."""
    by_kernel = [_by_scale(kernel, of_kernel)(_SCALES) for kernel, of_kernel in zip(kernels, points, strict=True)]
    return [list(chosen) for chosen in dict.fromkeys(zip(*by_kernel, strict=True))]


def largest_uniform(
    kernels: Sequence[PlannedKernel], points: Sequence[Points], options: Sequence[knapsack.Options], limits: np.ndarray
) -> list[int] | None:
    """The plan of the largest scale that fits, in either execution; None if none does."""
    found: list[tuple[float, list[int]]] = []
    by_kernel = [_by_scale(kernel, of_kernel) for kernel, of_kernel in zip(kernels, points, strict=True)]
    for last in (False, True):
        low, high, scale = 0.0, 1.0, 1.0
        for _ in range(40):  # to far less than a rank
            chosen = [options_at((scale,))[last] for options_at in by_kernel]
            if (knapsack.total_cost(options, chosen) <= limits).all():
                low = scale
                found.append((scale, chosen))
            else:
                high = scale
            scale = (low + high) / 2
    return max(found, key=lambda pair: pair[0], default=(0.0, None))[1]


def _by_scale(kernel: PlannedKernel, points: Points) -> Callable[[Sequence[float]], list[int]]:
    """A kernel's options at scales, in its rule's own scheme if that is open; in the first execution, then in the last."""
    place = 0 if (points.choice == 0).any() else int(points.choice.max())
    own, dense = np.flatnonzero((points.choice == place) & (points.rank > 0)), np.flatnonzero(points.rank == 0)
    if not len(own):
        return lambda scales: [int(dense[0])] * (2 * len(scales))
    view, rule = kernel.choices[place].view, rule_of(kernel)
    ranks, first, count = np.unique(points.rank[own], return_index=True, return_counts=True)
    ends = own[first], own[first + count - 1]  # of a rank, executions follow each other

    def options_at(scales: Sequence[float]) -> list[int]:
        wanted = np.array([rank_at(rule, view, float(scale)) for scale in scales])
        nearest = np.maximum(np.searchsorted(ranks, wanted, side="right") - 1, 0)
        saves = wanted * (view.n + view.m) < view.n * view.m
        options = [end[nearest] for end in ends]
        return [int(option) for each in options for option in (np.where(saves, each, dense[0]) if len(dense) else each)]

    return options_at
