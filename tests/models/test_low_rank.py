"""Every family runs on factors with no edit, and its factors learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import map_named
from tests import drawn

# What methods and activations compile to is another test's matter: few shapes here, and one activation a family.
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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    rules, kwargs = FAMILIES[request.param]
    model = models.build(request.param, num_classes=7, **kwargs)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    return model, x, drawn.variables(model, x), lr.plan(model, x, rules)


def run(model, variables, x, **kwargs):
    return jax.jit(lambda variables, x: lr.apply(model, variables, x, **kwargs))(variables, x)


def test_at_full_rank_the_logits_are_those_of_the_dense_network(family):
    model, x, variables, plan = family
    views = {kernel.name: kernel.view for kernel in plan.factored}

    def exact(name, leaf):
        if name not in views:
            return leaf
        u, s, vt = np.linalg.svd(views[name].to_matrix(leaf), full_matrices=False)
        return views[name].from_factors(jnp.asarray(u * s), jnp.asarray(vt))

    params = map_named(exact, variables["params"])
    assert sum(map(is_low_rank, jax.tree.leaves(params, is_leaf=is_low_rank))) == len(plan.factored) > 5
    # A product of factors is its kernel to a few units in the last place, 1e-7, which every layer behind it passes on.
    np.testing.assert_allclose(run(model, {**variables, "params": params}, x), run(model, variables, x), rtol=1e-4, atol=1e-4)


def test_gradients_reach_both_factors(family):
    model, x, variables, plan = family
    params = lr.factorize(variables["params"], plan, key=jax.random.key(2))

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
