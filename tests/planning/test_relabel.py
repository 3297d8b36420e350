"""A checkpoint that was trained in one execution goes on in another."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lr
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import named_leaves

MODEL = nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(8), nn.Sequential([nn.Dense(8)])])
X = np.random.default_rng(0).standard_normal((5, 10)).astype(np.float32)
RULES = [lr.Rule("layers_0/kernel", rank=2, execution="merged"), lr.Rule(".*kernel", rank=1, execution="merged")]
OPTIMIZER = optax.chain(optax.masked(optax.adam(0.1), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)), optax.ema(0.9))


def executions(tree):
    return [leaf.execution for leaf in jax.tree.leaves(tree, is_leaf=is_low_rank) if is_low_rank(leaf)]


@jax.jit
def step(params, state):
    grads = jax.grad(lambda params: jnp.sum(lr.apply(MODEL, {"params": params}, X) ** 2))(params)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.fixture(scope="module")
def trained():
    """A plan whose kernels run merged, and parameters and optimiser after a step."""
    plan = lr.plan(MODEL, X, RULES)
    params = lr.factorize(MODEL.init(jax.random.key(0), X)["params"], plan, key=jax.random.key(1))
    return plan, step(params, OPTIMIZER.init(params))


def test_a_step_after_relabelling_is_the_step_without(trained):
    _, state = trained
    relabelled = lr.with_execution(state, "factored")
    assert set(executions(state)) == {"merged"} and set(executions(relabelled)) == {"factored"}
    assert len(executions(relabelled)) == len(executions(state))
    for one, other in zip(jax.tree.leaves(step(*relabelled)), jax.tree.leaves(step(*state)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    back = lr.with_execution(relabelled, "merged")
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_a_plan_says_it_kernel_by_kernel_also_in_optimisers(trained):
    _, state = trained
    plan = lr.plan(MODEL, X, [lr.Rule("layers_0/kernel", rank=2, execution="premerged"), lr.Rule(".*kernel", rank=1)])
    params, optimizer = lr.with_execution(state, plan)
    pairs = [
        (name, leaf.execution)
        for name, leaf in named_leaves((params, optimizer), is_leaf=is_low_rank).items()
        if is_low_rank(leaf)
    ]
    assert len(pairs) == 4 * 3  # parameters, two moments, an average
    for name, execution in pairs:
        assert execution == ("premerged" if name.endswith("/layers_0/kernel") and "layers_3" not in name else "factored")
    assert jax.tree.structure(params) == jax.tree.structure(lr.with_execution(params, plan))


def test_premerged_pairs_stay_so_unless_a_plan_says_otherwise(trained):
    plan, (params, _) = trained
    premerged = lr.with_execution(params, "premerged")
    assert set(executions(lr.with_execution(premerged, "factored"))) == {"premerged"}
    assert set(executions(lr.with_execution(premerged, plan))) == {"merged"}


def test_pairs_that_the_plan_does_not_know_stay(trained):
    plan, (params, _) = trained
    own = dataclasses.replace(params["layers_0"]["kernel"], execution="premerged")
    tree = lr.with_execution({"own": own, **lr.with_execution(params, "factored")}, plan)
    assert tree["own"].execution == "premerged" and set(executions({**tree, "own": None})) == {"merged"}


def test_what_cannot_be_meant_is_refused(trained):
    plan, (params, _) = trained
    with pytest.raises(ValueError, match="unknown execution 'factord'; did you mean factored"):
        lr.with_execution(params, "factord")
    with pytest.raises(
        ValueError, match="none of the plan's factored kernels is a factor pair of this tree, 'layers_0/kernel'"
    ):
        lr.with_execution(lr.merge(params), plan)
