"""Plans of three tiny networks against every combination of ranks."""

import itertools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.planning import knapsack
from lowrank_jax.planning.curves import curves_of_kernels
from tests.planning.hulls import segments


class Convolutions(nn.Module):
    """With two schemes for each of the convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(5)(x.mean(axis=(1, 2)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(8, name="dense")(x)), None


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(12)(scan(name="layers")(x, None)[0])


NETWORKS = {
    "dense": (nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(9), nn.relu, nn.Dense(7)]), jnp.ones((2, 10))),
    "convolutions": (Convolutions(), jnp.ones((2, 6, 6, 5))),
    "repeated": (Repeated(), jnp.ones((2, 8))),
}


def options(plan, kind, objective):
    """What every kernel may become, from the curves of Gaussian kernels."""
    curves, found = curves_of_kernels(plan.kernels), []
    for kernel in plan.kernels:
        copies = math.prod(kernel.stack)
        costs, losses = [getattr(kernel, kind)], [0.0]
        for choice, curve in zip(kernel.choices, curves[kernel.name], strict=True):
            for rank in range(1, choice.view.full_rank + 1):
                if choice.params(rank) < choice.view.n * choice.view.m:
                    costs.append(copies * choice.params(rank) if kind == "params" else choice.macs(rank))
                    losses.append(curve.risk[rank - 1] if objective == "tolerance" else copies * curve.correlation[rank - 1])
        found.append(knapsack.Options(np.array([costs], float), np.array(losses)))
    return found


def combinations(kernels, objective):
    """Costs and losses of all of them."""
    every = list(itertools.product(*(range(len(kernel.loss)) for kernel in kernels)))
    costs = sum(kernels[i].cost[0][[chosen[i] for chosen in every]] for i in range(len(kernels)))
    losses = [kernels[i].loss[[chosen[i] for chosen in every]] for i in range(len(kernels))]
    return costs, np.max(losses, axis=0) if objective == "tolerance" else np.sum(losses, axis=0)


def lost(plan, whole, objective):
    """What a plan loses of Gaussian kernels."""
    curves, losses = curves_of_kernels(whole.kernels), [0.0]
    for kernel in plan.factored:
        curve = curves[kernel.name][kernel.choices.index(kernel.choice)]
        by_rank = curve.risk if objective == "tolerance" else math.prod(kernel.stack) * curve.correlation
        losses.append(by_rank[kernel.rank - 1])
    return max(losses) if objective == "tolerance" else math.fsum(losses)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("name", NETWORKS)
def test_allocate_is_brute_force_at_the_corners_and_within_a_segment_elsewhere(name, kind):
    model, x = NETWORKS[name]
    plan = lr.plan(model, x, [lr.Rule(".*kernel", scale=1.0)])
    assert all(kernel.choices for kernel in plan.kernels)
    kernels = options(plan, kind, "correlation")
    costs, losses = combinations(kernels, "correlation")
    fixed = plan.other_params if kind == "params" else 0
    chosen = knapsack.cheapest(kernels, np.ones(1))
    before = knapsack.total_cost(kernels, chosen)[0]
    for kernel, option in [(0, chosen[0]), *segments(kernels)]:
        drop = kernels[kernel].loss[chosen[kernel]] - kernels[kernel].loss[option]
        chosen[kernel] = option
        corner = knapsack.total_cost(kernels, chosen)[0]
        for budget, slack in ((corner, 0.0), ((before + corner) // 2, drop)):
            best = losses[costs <= budget].min()
            made = lr.allocate(plan, **{kind: int(budget) + fixed}, objective="correlation")
            found = lost(made, plan, "correlation")
            assert best - 1e-9 <= found <= best + slack + 1e-9, f"{kind}={budget}"
        before = corner


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_ranks_have_a_smaller_largest_risk(name, kind):
    model, x = NETWORKS[name]
    plan = lr.plan(model, x, [lr.Rule(".*kernel", scale=1.0)])
    costs, losses = combinations(options(plan, kind, "tolerance"), "tolerance")
    fixed = plan.other_params if kind == "params" else 0
    for budget in np.linspace(costs.min(), costs.max(), 25).astype(int):
        found = lost(lr.allocate(plan, **{kind: int(budget) + fixed}), plan, "tolerance")
        assert found == pytest.approx(losses[costs <= budget].min(), abs=1e-9), f"{kind}={budget}"
