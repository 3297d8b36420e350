"""Ranks that keep a share of a kernel's squared singular values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.planning.plans import DenseKernel, FactoredKernel, OpenKernel

X = jnp.ones((2, 8, 8, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(24, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def spectrum(n, m, seed, decay=1.5):
    """A matrix whose singular values fall."""
    draw = np.random.default_rng(seed)
    u, v = (np.linalg.qr(draw.normal(size=(size, min(n, m))))[0] for size in (n, m))
    return (u * np.arange(1, min(n, m) + 1) ** -decay) @ v.T


@pytest.fixture(scope="module")
def variables():
    made = Net().init(jax.random.key(0), X)
    params = {
        layer: {
            "kernel": jnp.asarray(
                spectrum(leaf["kernel"].size // leaf["kernel"].shape[-1], leaf["kernel"].shape[-1], i).reshape(
                    leaf["kernel"].shape
                ),
                jnp.float32,
            ),
            "bias": leaf["bias"],
        }
        for i, (layer, leaf) in enumerate(made["params"].items())
    }
    return {"params": params}


def plan_of(**settings):
    return lr.plan(Net(), X, [lr.Rule(".*kernel", **settings)])


def rank_of(matrix, energy):
    squares = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(squares) >= energy * squares.sum())) + 1


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.97])
def test_it_is_the_smallest_rank_that_keeps_the_share(variables, energy, scheme):
    plan = plan_of(energy=energy, scheme=scheme)
    made = lr.allocate(plan, variables=variables)
    for kernel in made.kernels:
        view = kernel.choices[0].view
        rank = rank_of(view.to_matrix(variables["params"][kernel.name.split("/")[0]]["kernel"]), energy)
        if isinstance(kernel, FactoredKernel):
            assert kernel.rank == rank and kernel.view == view
            assert kernel.risk is not None and 0 < kernel.risk < 1
        else:
            assert f"energy {energy}: rank {rank} would not be smaller" in kernel.note
            assert rank * (view.n + view.m) >= view.n * view.m
    assert made.factored and lr.allocate(made, variables=variables) == made


def test_a_plan_is_open_until_then_and_says_so(variables):
    plan = plan_of(energy=0.9)
    assert all(isinstance(kernel, OpenKernel) for kernel in plan.kernels)
    assert plan.params == plan.dense_params and "energy 0.9" in str(plan) and "energy 0.9" in plan._repr_html_()
    closed = lr.allocate(plan, variables=variables)
    params = lr.factorize(variables["params"], closed, key=jax.random.key(0))
    refusal = (
        r"no rank for 'Conv_0/kernel' and 2 more, whose rule gives an energy: plan = lr\.allocate\(plan, variables=variables\)"
    )
    calls = [
        lambda: lr.factorize(variables["params"], plan, key=jax.random.key(0)),
        lambda: lr.factorize(jax.eval_shape(lambda: variables["params"]), plan, key=jax.random.key(0)),
        lambda: lr.unflatten(lr.flatten(params), plan),
        lambda: lr.with_execution(params, plan),
        lambda: lr.choose_execution(plan, None, batch=1),
        lambda: lr.inputs.moment_shapes(plan),
        lambda: lr.inputs.second_moments(Net(), variables, [X], plan),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=refusal):
            call()
    assert jax.tree.structure(lr.unflatten(lr.flatten(params), closed)) == jax.tree.structure(params)


def test_without_values_it_is_refused_by_name_and_afterwards_they_are_known(variables):
    plan = plan_of(energy=0.8)
    for budget in ({}, {"params": 0.5}):
        with pytest.raises(ValueError, match="the rule of 'Conv_0/kernel' and 2 more gives an energy"):
            lr.allocate(plan, **budget)
    closed = lr.allocate(plan, variables=variables)
    assert lr.allocate(closed) == closed
    assert lr.allocate(closed, params=0.2).params <= 0.2 * plan.dense_params


def test_it_is_a_bound_within_a_budget(variables):
    plan = plan_of(energy=0.8)
    closed = {kernel.name: kernel for kernel in lr.allocate(plan, variables=variables).kernels}
    for share in (0.1, 0.9):
        made = lr.allocate(plan, params=share, variables=variables)
        for kernel in made.factored:
            if kernel.choice == closed[kernel.name].choices[0]:
                assert kernel.rank <= getattr(closed[kernel.name], "rank", np.inf)
    risks = [(kernel.risk or 0, closed[kernel.name].risk or 0) for kernel in made.kernels]
    assert all(risk <= bound + 1e-6 for risk, bound in risks)


def test_only_what_asks_for_it_waits_for_values(variables):
    plan = lr.plan(Net(), X, [lr.Rule("Dense_0/kernel", energy=0.7, multiple_of=4), lr.Rule(".*kernel", scale=0.25)])
    made = lr.allocate(plan, variables=variables)
    assert made.kernels[:2] == plan.kernels[:2] and made.kernels[2].rank % 4 == 0


def test_moments_change_which_share_is_meant(variables):
    plan = plan_of(energy=0.9)
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 3)) * jnp.asarray([3.0, 1.0, 0.01])
    moments = lr.inputs.second_moments(Net(), variables, [x], plan.opened())
    made = {kernel.name: kernel for kernel in lr.allocate(plan, variables=variables, moments=moments).kernels}
    kernel = made["Dense_0/kernel"]
    values, vectors = np.linalg.eigh(np.asarray(moments[kernel.name], np.float64))
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    assert kernel.rank == rank_of(root @ np.asarray(variables["params"]["Dense_0"]["kernel"]), 0.9)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(24, name="dense")(x)), None


def test_of_a_repeated_module_every_kernel_keeps_it():
    model = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    x = jnp.ones((2, 24))
    plan = lr.plan(model, (x, None), [lr.Rule(".*kernel", energy=0.9)])
    kernels = jnp.asarray([spectrum(24, 24, 0, decay) for decay in (2.0, 0.8)], jnp.float32)
    params = {"dense": {"kernel": kernels, "bias": jnp.zeros((2, 24))}}
    [kernel] = lr.allocate(plan, variables=params).kernels
    assert kernel.rank == max(rank_of(matrix, 0.9) for matrix in kernels)


def test_parameters_of_any_module_and_what_something_else_reads(variables):
    embedding = nn.Sequential([nn.Embed(32, 16), nn.Dense(8)])
    tokens = jnp.ones((2, 3), int)
    plan = lr.plan(embedding, tokens, [lr.Rule(".*embedding", rows=(0,), energy=0.5), lr.Rule(".*", rank=2)])
    [kernel, _] = [*plan.kernels][::-1] if plan.kernels[0].name.startswith("layers_1") else plan.kernels
    assert isinstance(kernel, OpenKernel) and kernel.execution == "premerged"
    made = lr.allocate(plan, variables=embedding.init(jax.random.key(0), tokens))
    assert {kernel.name: kernel for kernel in made.kernels}["layers_0/embedding"].rank < 16
    normed = nn.Sequential([nn.WeightNorm(nn.Dense(32))])
    x = jnp.ones((2, 32))
    for execution in ("auto", "factored"):
        plan = lr.plan(normed, x, [lr.Rule(".*kernel", energy=0.5, execution=execution)])
        [kernel] = [kernel for kernel in plan.kernels if kernel.name.endswith("/kernel") and kernel.rule is not None]
        if execution == "auto":
            assert kernel.execution == "premerged" and kernel.note in kernel.row()[-1]
            [made] = lr.allocate(plan, variables=normed.init(jax.random.key(0), x)).factored
            assert made.note == kernel.note != "" and made.execution == "premerged"
        else:
            assert type(kernel) is DenseKernel and not kernel.choices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 0.9, "scale": 0.5}, "has both scale 0.5 and energy 0.9; give one"),
        ({"energy": 0.9, "rank": 3}, "has both rank 3 and energy 0.9; give one"),
        ({"energy": 0.9, "rank": 3, "scale": 1.0}, "has scale 1.0 and rank 3 and energy 0.9; give one"),
        ({"energy": 0.0}, r"energy 0.0 must be in \(0, 1\]"),
        ({"energy": 1.5}, r"energy 1.5 must be in \(0, 1\]"),
        ({"energy": True}, "energy True must be a number"),
        ({"energy": "0.9"}, "energy '0.9' must be a number"),
        ({"normalized": "each"}, "normalized 'each' must be True, False or None"),
    ],
)
def test_bad_rules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lr.Rule(".*", **settings)


def test_a_kernel_of_a_lower_rank_keeps_everything_there_and_a_zero_kernel_at_one(variables):
    draw = np.random.default_rng(0)
    params = dict(variables["params"])
    kernel = params["Dense_0"]["kernel"]
    low = jnp.asarray(draw.normal(size=(kernel.shape[0], 3)) @ draw.normal(size=(3, kernel.shape[1])), jnp.float32)
    for changed, rank in ((low, 3), (jnp.zeros_like(kernel), 1)):
        params["Dense_0"] = {"kernel": changed, "bias": params["Dense_0"]["bias"]}
        made = lr.allocate(plan_of(energy=1.0), variables=params)
        assert made.kernels[-1].rank == rank
