"""The solver against brute force over every combination."""

import itertools

import numpy as np
import pytest

from lowrank_jax.planning import knapsack
from lowrank_jax.planning.knapsack import Options
from tests.planning.hulls import segments

NETWORKS = 3


def network(seed, budgets=1, kernels=4, options=5):
    """Falling losses over growing costs, the last option dense; neither convex nor on a grid."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(kernels):
        cost = np.cumsum(draw.uniform(0.5, 3, (budgets, options)), axis=1)
        loss = np.append(np.sort(draw.uniform(0.1, 2, options - 1))[::-1], 0)
        found.append(Options(cost, loss))
    return found


def brute(kernels, limits, worst=False):
    """The least loss of all combinations; infinite if none fits."""
    best = np.inf
    for chosen in itertools.product(*(range(len(kernel.loss)) for kernel in kernels)):
        if (knapsack.total_cost(kernels, list(chosen)) <= limits).all():
            losses = [kernel.loss[option] for kernel, option in zip(kernels, chosen, strict=True)]
            best = min(best, max(losses) if worst else sum(losses))
    return best


def corners(kernels):
    """The budgets that the hulls hit, and the drop of the segment that ends there."""
    chosen = knapsack.cheapest(kernels, np.ones(1))
    found = [(knapsack.total_cost(kernels, chosen)[0], 0.0)]
    for kernel, option in segments(kernels):
        drop = kernels[kernel].loss[chosen[kernel]] - kernels[kernel].loss[option]
        chosen[kernel] = option
        found.append((knapsack.total_cost(kernels, chosen)[0], drop))
    return found


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_it_is_brute_force_at_the_corners_and_within_a_segment_elsewhere(seed):
    kernels = network(seed)
    known = corners(kernels)
    for limit, _ in known:
        found = knapsack.least_sum(kernels, np.array([limit + 1e-9]))
        assert knapsack.total_loss(kernels, found) == pytest.approx(brute(kernels, limit + 1e-9))
    for (low, _), (high, drop) in itertools.pairwise(known):
        limit = np.array([low + 0.7 * (high - low)])
        found = knapsack.least_sum(kernels, limit)
        assert (knapsack.total_cost(kernels, found) <= limit).all()
        assert brute(kernels, limit) <= knapsack.total_loss(kernels, found) + 1e-12 <= brute(kernels, limit) + drop + 1e-9


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_more_budget_never_loses_more(seed):
    kernels = network(seed)
    limits = np.linspace(corners(kernels)[0][0], corners(kernels)[-1][0] + 1, 60)
    for least, lost in ((knapsack.least_sum, sum), (knapsack.least_worst, max)):
        found = [least(kernels, np.array([limit + 1e-9])) for limit in limits]
        losses = [lost(kernel.loss[option] for kernel, option in zip(kernels, chosen, strict=True)) for chosen in found]
        assert all(one >= other for one, other in itertools.pairwise(losses)) and losses[-1] == 0


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_the_largest_loss_is_the_least_possible(seed):
    kernels = network(seed)
    for limit in np.linspace(corners(kernels)[0][0], corners(kernels)[-1][0], 7):
        found = knapsack.least_worst(kernels, np.array([limit + 1e-9]))
        worst = max(kernel.loss[option] for kernel, option in zip(kernels, found, strict=True))
        assert worst == brute(kernels, limit + 1e-9, worst=True)


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_two_budgets_hold_both(seed):
    kernels = network(seed, budgets=2)
    whole = sum(kernel.cost[:, -1] for kernel in kernels)
    for shares in ((0.5, 0.9), (0.8, 0.6), (0.7, 0.7)):
        limits = np.array(shares) * whole
        found = knapsack.least_sum(kernels, limits)
        assert (knapsack.total_cost(kernels, found) <= limits).all()
        largest = max(drop for _, drop in corners([Options(kernel.cost[:1], kernel.loss) for kernel in kernels]))
        assert brute(kernels, limits) <= knapsack.total_loss(kernels, found) + 1e-12 <= brute(kernels, limits) + largest + 1e-9


def test_what_fits_no_budget_is_none():
    kernels = network(0)
    assert knapsack.least_sum(kernels, np.array([0.1])) is None and knapsack.least_worst(kernels, np.array([0.1])) is None


def test_a_hull_has_growing_slopes_and_starts_with_the_cheapest():
    cost, loss = np.array([1.0, 2, 3, 4, 5, 1]), np.array([np.inf, 4, 3.9, 1, 0, 9])
    assert knapsack.hull(cost, loss) == [5, 1, 3, 4]
    assert knapsack.hull(np.array([1.0, 2]), np.array([np.inf, 1])) == [0, 1]


def test_weights_between_those_that_are_tried_first_count_too():
    """Of this kernel only some weights between a half and three quarters choose the option that fits."""
    kernel = Options(np.array([[1, 0.2, 1.5], [1, 3, 0.3]]), np.array([1.0, 0.5, 0.2]))
    assert knapsack.least_sum([kernel], np.ones(2)) == [0]


def test_alike_kernels_are_changed_one_by_one():
    [kernel] = network(0, kernels=1)
    alike, known = [kernel] * 4, corners([kernel])
    costs = [kernel.cost[0, option] for option in knapsack.hull(kernel.cost[0], kernel.loss)]
    for changed in range(5):
        limit = (4 - changed) * known[0][0] + changed * costs[1]
        found = knapsack.least_sum(alike, np.array([limit + 1e-9]))
        assert knapsack.total_loss(alike, found) == pytest.approx(brute(alike, limit + 1e-9))
