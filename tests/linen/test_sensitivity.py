"""Sensitivities against a direct computation in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr

X = jax.random.normal(jax.random.key(7), (40, 12))


class Net(nn.Module):
    """With a layer whose output nobody uses, and a BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        nn.Dense(9, name="unused")(x)
        x = nn.Dense(16, name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(5, name="second")(x)


@pytest.fixture(scope="module")
def variables():
    return Net().init(jax.random.key(0), X)


PLAN = lr.plan(Net(), X, [lr.Rule("first/kernel", rank=3), lr.Rule(".*kernel", scale=1.0)])


def directly(variables, name, rank, activation="relu"):
    """The divergence of the softmaxes in float64, and the risk of the projection."""
    w = variables["params"][name]["kernel"]
    u, v = lr.projection.kernel_projection(w, rank, activation=activation)
    params = {**variables["params"], name: {**variables["params"][name], "kernel": u @ v}}
    one, other = (
        np.asarray(Net().apply({**variables, "params": kernels}, X), np.float64) for kernels in (variables["params"], params)
    )
    p, q = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) for logits in (one, other))
    return (p * np.log(p / q)).sum(axis=1).mean()


def test_it_is_the_divergence_by_the_risk(variables):
    said = []
    found = lr.sensitivity(Net(), variables, [X[:30], X[30:]], PLAN, say=said.append)
    assert list(found) == ["unused/kernel", "first/kernel", "second/kernel"] and found["unused/kernel"] == 0
    risks = {
        "first": lr.projection.curves(variables["params"]["first"]["kernel"], normalized="each").risk[2],
        "second": lr.projection.curves(variables["params"]["second"]["kernel"]).risk[1],
    }
    for name, rank in (("first", 3), ("second", 2)):
        expected = directly(variables, name, rank) / risks[name]
        np.testing.assert_allclose(found[f"{name}/kernel"], expected, rtol=1e-3)
    assert len(said) == 6 and said[-1] == "batch 2, kernel 3 of 3: second/kernel"


def test_one_program_serves_all_kernels(variables):
    traced = []

    class Counted(Net):
        def __call__(self, x, train=False):
            traced.append(x.shape)
            return super().__call__(x, train)

    plan = lr.plan(Counted(), X, [lr.Rule(".*kernel", scale=0.5)])
    traced.clear()
    lr.sensitivity(Counted(), variables, [X, X], plan)
    assert len(traced) == 1


def test_boxes_states_and_other_outputs(variables):
    expected = lr.sensitivity(Net(), variables, [X], PLAN)
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), variables["params"])
    assert lr.sensitivity(Net(), {**variables, "params": boxed}, [X], PLAN) == expected

    class Wrapped(Net):
        @nn.compact
        def __call__(self, x, train=False):
            return {"logits": super().__call__(x, train)}

    plan = lr.plan(Wrapped(), X, [lr.Rule("first/kernel", rank=3), lr.Rule(".*kernel", scale=1.0)])
    found = lr.sensitivity(Wrapped(), variables, [X], plan, logits=lambda returned: returned["logits"])
    assert found == pytest.approx(expected)
    with pytest.raises(TypeError, match="Wrapped returns no array of logits: pass logits="):
        lr.sensitivity(Wrapped(), variables, [X], plan)
    trained = lr.sensitivity(Net(), variables, [X], PLAN, train=True)
    assert trained["first/kernel"] > 0 and trained != expected


def test_a_kernel_that_loses_nothing_at_half_its_rank_is_measured_at_less(variables):
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    draw = np.random.default_rng(0)
    params["second"]["kernel"] = jnp.asarray(draw.normal(size=(16, 2)) @ draw.normal(size=(2, 5)), jnp.float32)
    params["first"]["kernel"] = jnp.zeros((12, 16))
    plan = lr.plan(Net(), X, [lr.Rule(".*kernel", scale=1.0)])
    found = lr.sensitivity(Net(), {**variables, "params": params}, [X], plan)
    assert found["first/kernel"] == 0  # nothing to lose
    assert np.isfinite(found["second/kernel"])


def test_a_budget_takes_it(variables):
    counts = lr.sensitivity(Net(), variables, [X], PLAN)
    plan = lr.plan(Net(), X, [lr.Rule(".*kernel", scale=1.0)])
    made = {kernel.name: kernel for kernel in lr.allocate(plan, params=0.6, variables=variables, sensitivity=counts).kernels}
    assert made["unused/kernel"].rank == 1


def test_what_is_no_number_or_no_fit_is_refused(variables):
    broken = jax.tree.map(lambda leaf: leaf, variables)
    with pytest.raises(ValueError, match="no batches"):
        lr.sensitivity(Net(), variables, [], PLAN)
    with pytest.raises(ValueError, match="batch 1: the model's predictions are not numbers"):
        lr.sensitivity(Net(), variables, [X, X * jnp.nan], PLAN)
    with pytest.raises(ValueError, match="batch 0 is empty"):
        lr.sensitivity(Net(), variables, [X[:0]], PLAN)
    broken["params"]["first"]["kernel"] = jnp.full((12, 16), jnp.nan)
    with pytest.raises(ValueError, match="first/kernel: has values that are not finite"):
        lr.sensitivity(Net(), broken, [X], PLAN)
    with pytest.raises(ValueError, match=r"first/kernel: planned as .*, is factored"):
        params = lr.factorize(variables["params"], lr.plan(Net(), X, [lr.Rule("first/.*", rank=2)]), key=jax.random.key(0))
        lr.sensitivity(Net(), {**variables, "params": params}, [X], PLAN)


def test_a_low_rank_that_breaks_the_predictions_is_named(variables):
    class Fragile(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(16, use_bias=False, name="first")(x)
            return jnp.where(jnp.abs(y.sum() - self.variables["expected"]["sum"]) < 1e-2, y, jnp.nan)

    params = {"first": {"kernel": variables["params"]["first"]["kernel"]}}
    given = {"params": params, "expected": {"sum": (X @ params["first"]["kernel"]).sum()}}
    plan = lr.plan(Net(), X, [lr.Rule("first/kernel", rank=2)])
    plan = type(plan)(tuple(kernel for kernel in plan.kernels if kernel.name == "first/kernel"), 0)
    with pytest.raises(ValueError, match="with first/kernel at a low rank the predictions are not numbers"):
        lr.sensitivity(Fragile(), given, [X], plan)
