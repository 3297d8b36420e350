"""Models that jit parts of themselves: what jax keeps of one trace is not used in another."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr

X = jax.random.normal(jax.random.key(0), (6, 8))
RULES = [lr.Rule(".*kernel", rank=2)]


def model() -> nn.Module:
    class Model(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(16, name="first")(x))
            return nn.Dense(8, name="second")(nn.Dropout(0.0, deterministic=False)(nn.relu(x)))

    return Model()


@pytest.fixture
def jitted():
    made, rngs = model(), {"dropout": jax.random.key(1)}
    return made, rngs, made.init({"params": jax.random.key(0), **rngs}, X)


def test_a_plan_after_another_and_after_a_call_is_the_same(jitted):
    made, rngs, variables = jitted
    made.apply(variables, X, mutable=["batch_stats"], rngs=rngs)
    first, second = (lr.plan(made, X, RULES, rngs=rngs) for _ in range(2))
    assert first == second and len(first.factored) == 2


def test_what_a_plan_traced_is_not_what_apply_runs(jitted):
    made, rngs, variables = jitted
    plan = lr.plan(made, X, RULES, rngs=rngs)
    rest, params = {"batch_stats": variables["batch_stats"]}, lr.factorize(variables["params"], plan, key=jax.random.key(2))
    y, _ = lr.apply(made, {"params": params, **rest}, X, mutable=["batch_stats"], rngs=rngs)
    plain, _ = made.apply({"params": lr.merge(params), **rest}, X, mutable=["batch_stats"], rngs=rngs)
    np.testing.assert_allclose(y, plain, atol=1e-5)


def test_inputs_are_captured_as_often_as_asked():
    class Model(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="layer")(x)

    made = Model()
    variables, plan = made.init(jax.random.key(0), X), lr.plan(made, X, RULES)
    moments = lr.inputs.second_moments(made, variables, [X], plan)["layer/kernel"]
    np.testing.assert_allclose(moments, X.T @ X / len(X), atol=1e-5)
    for seed, number in ((1, 3), (2, 2)):
        found = lr.inputs.samples(made, variables, [X], plan, key=jax.random.key(seed), per_batch=number)
        assert jnp.shape(found["layer/kernel"]) == (number, 1, 8)
