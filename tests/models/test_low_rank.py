"""Every family runs on factors with no edit, and its factors learn."""

import functools

import jax
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import map_named
from tests import drawn

spectral = functools.partial(lr.Rule, scale=0.3, method="spectral")
EFFICIENTNET = [
    lr.Rule("(stem/conv|head)/kernel"),
    spectral("stage[24]/.*/(expand|project)/kernel"),
    spectral("stage2/.*/se/excite/kernel"),
    lr.Rule("top/conv/kernel", scale=0.3, activation="silu"),
]
WIDE_RESNET = [
    lr.Rule("(stem|head)/kernel"),
    spectral(".*/(conv2|proj)/kernel"),
    lr.Rule(".*/conv1/kernel", scale=0.3, scheme="spatial", activation="relu"),
]
VIT = [
    lr.Rule("head/kernel"),
    spectral("embed/kernel"),
    spectral(".*/(attention/.*|fc2)/kernel"),
    lr.Rule(".*/fc1/kernel", scale=0.3, activation="gelu"),
]
FAMILIES = {
    "efficientnet_b0": (EFFICIENTNET, {"width": 0.1, "depth": 0.1}),
    "wrn_16_4": (WIDE_RESNET, {"depth": 10, "widening": 1}),
    "vit_s16": (VIT, {"width": 16, "depth": 1, "heads": 2, "patch": 8}),
}


@functools.cache
def family(name):
    rules, kwargs = FAMILIES[name]
    model = models.build(name, num_classes=7, **kwargs)
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    return model, x, drawn.variables(model, x), lr.plan(model, x, rules)


def run(model, variables, x, **kwargs):
    return jax.jit(lambda variables, x: lr.apply(model, variables, x, **kwargs))(variables, x)


def truncated(params, plan, rank=None):
    """The parameters with the planned kernels' singular value decompositions for kernels, at the planned rank or at another."""
    kernels = {kernel.name: kernel for kernel in plan.factored}

    def factor(name, leaf):
        if name not in kernels:
            return leaf
        view, r = kernels[name].view, rank or kernels[name].rank
        u, s, vt = np.linalg.svd(view.to_matrix(leaf), full_matrices=False)
        return view.from_factors(u[:, :r] * s[:r], vt[:r])

    return map_named(factor, params)


@pytest.mark.parametrize("name", FAMILIES)
def test_at_full_rank_the_logits_are_those_of_the_dense_network(name):
    model, x, variables, plan = family(name)
    params = truncated(variables["params"], plan, rank=10**6)
    assert sum(map(is_low_rank, jax.tree.leaves(params, is_leaf=is_low_rank))) == len(plan.factored) > 5
    # A product of factors is its kernel to a few units in the last place, 1e-7, which every layer behind it passes on.
    np.testing.assert_allclose(run(model, {**variables, "params": params}, x), run(model, variables, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [pytest.param("efficientnet_b0", marks=pytest.mark.slow), "wrn_16_4", "vit_s16"])
def test_gradients_reach_both_factors(name):
    model, x, variables, plan = family(name)
    planned = jax.eval_shape(lambda params: lr.factorize(params, plan, key=jax.random.key(2)), variables["params"])
    assert sum(leaf.size for leaf in jax.tree.leaves(planned)) == plan.params
    params = truncated(variables["params"], plan)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, planned)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits, _ = lr.apply(
            model, {**variables, "params": params}, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)}
        )
        return (logits**2).sum()

    grads = [leaf for leaf in jax.tree.leaves(gradient(params), is_leaf=is_low_rank) if is_low_rank(leaf)]
    assert len(grads) == len(plan.factored)
    for grad in grads:
        for factor in (grad.u, grad.v):
            assert np.isfinite(factor).all()
            assert np.abs(factor).max() > 0
