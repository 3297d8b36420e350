"""The segments of hulls, of which allocation is made."""

import itertools

from lowrank_jax.planning import knapsack


def segments(kernels):
    """The hulls' segments by slope, steepest first: the kernel, and the option at the segment's end."""
    found = []
    for number, kernel in enumerate(kernels):
        for one, other in itertools.pairwise(knapsack.hull(kernel.cost[0], kernel.loss)):
            slope = (kernel.loss[other] - kernel.loss[one]) / (kernel.cost[0, other] - kernel.cost[0, one])
            found.append((slope, number, other))
    return [(number, option) for _, number, option in sorted(found, key=lambda segment: segment[:2])]
