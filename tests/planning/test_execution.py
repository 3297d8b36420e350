"""How factored kernels run: the same function either way, and the choice between them."""

import dataclasses
import importlib.util
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.paths import map_named, named_leaves
from lowrank_jax.planning.chips import CHIPS, Chip
from lowrank_jax.planning.execution import dense_seconds, rest_of_step, seconds
from tests import drawn

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


class Scanned(nn.Module):
    """Three dense layers with stacked kernels."""

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return nn.relu(layer(x)), None

        stack = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(nn.Dense(12, name="layer"), x, None)
        return x


class Net(nn.Module):
    """A strided convolution, a pointwise one and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="window")(x))
        x = nn.relu(nn.Conv(12, (1, 1), name="pointwise")(x))
        return nn.Dense(6, name="dense")(x.mean((1, 2)))


@pytest.mark.parametrize(("model", "shape"), [(Net(), (2, 8, 8, 4)), (Scanned(), (4, 12))])
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_either_execution_gives_the_same_function_and_gradients(model, shape, scheme):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    params = drawn.variables(model, x)["params"]

    def factored(execution):
        plan = lr.plan(model, x, [lr.Rule(".*", scale=0.25, scheme=scheme, execution=execution)])
        assert {kernel.execution for kernel in plan.factored} == {execution}
        rng = np.random.default_rng(1)

        def pair(kernel):
            u, v = (kernel.view.n, kernel.rank), (kernel.rank, kernel.view.m)
            factors = (jnp.asarray(rng.standard_normal((*kernel.stack, *size)) / 3, jnp.float32) for size in (u, v))
            return kernel.view.from_factors(*factors, kernel.execution)

        pairs = {kernel.name: pair(kernel) for kernel in plan.factored}
        return map_named(lambda name, leaf: pairs.get(name, leaf), params)

    def gradients(params):
        return jax.value_and_grad(lambda p: (lr.apply(model, {"params": p}, x) ** 2).sum())(params)

    run = jax.jit(lambda *networks: [gradients(params) for params in networks])
    (loss, grads), (merged_loss, merged_grads) = run(factored("factored"), factored("merged"))
    np.testing.assert_allclose(loss, merged_loss, rtol=1e-4)
    grads, merged_grads = named_leaves(grads), named_leaves(merged_grads)
    largest = max(np.abs(leaf).max() for leaf in grads.values())
    for name, grad in grads.items():  # float32's sums in another order; some gradients are zero but for rounding
        np.testing.assert_allclose(grad, merged_grads[name], rtol=1e-3, atol=1e-5 * largest, err_msg=name)


def dense_plan(n, m, rank, **rule):
    return lr.plan(nn.Dense(m, use_bias=False), jnp.zeros((1, n)), [lr.Rule(".*", rank=rank, **rule)])


def test_the_costs_of_a_dense_layer_are_those_of_its_products():
    """One chip does a FLOP a second and moves bytes at once; the other moves a byte a second and computes at once."""
    (kernel,) = dense_plan(48, 80, 5).factored
    computing, moving = Chip("a", "a", 1, 1e30, 1), Chip("b", "b", 1e30, 1, 1)
    batch, n, m, r = 32, 48, 80, 5
    assert seconds(kernel, "factored", computing, batch) == 3 * 2 * batch * (n * r + r * m)
    assert seconds(kernel, "merged", computing, batch) == 3 * 2 * (batch * n * m + n * m * r)
    x, y, h, w = (4 * size for size in (batch * n, batch * m, batch * r, n * m))
    assert seconds(kernel, "factored", moving, batch) == pytest.approx(4 * x + 5 * y + 6 * h)
    assert seconds(kernel, "merged", moving, batch) == pytest.approx(4 * x + 5 * y + 3 * w)


def test_tiles_that_an_axis_does_not_fill_are_moved_whole():
    (kernel,) = dense_plan(128, 256, 4).factored
    plain = Chip("b", "b", 1e30, 1, 1)
    tiled = dataclasses.replace(plain, tile=(8, 128))
    # 64 examples of 4 elements: 64 x 4 in tiles of 8 x 128 is either 8 x 128, four times as much, or 64 x 128.
    more = seconds(kernel, "factored", tiled, 64) - seconds(kernel, "factored", plain, 64)
    assert more == pytest.approx(6 * (4 - 1) * 64 * 4 * 4)


def test_what_computes_slowly_runs_on_factors_and_what_moves_slowly_does_not():
    model = models.build("resnet20", num_classes=10)
    plan = lr.plan(model, jnp.zeros((1, 32, 32, 3)), [lr.Rule(".*", scale=0.25)])
    for chip, expected in (
        (Chip("a", "a", 1e9, 1e30, 1), "factored"),
        (Chip("b", "b", 1e30, 1e9, 1), "merged"),
        (None, "factored"),
    ):
        chosen = lr.choose_execution(plan, chip, batch=128)
        assert {kernel.execution for kernel in chosen.factored} == {expected}
        assert [kernel.name for kernel in chosen.kernels] == [kernel.name for kernel in plan.kernels]


def test_a_rule_that_says_how_is_obeyed():
    for execution in ("factored", "merged"):
        plan = lr.choose_execution(dense_plan(64, 64, 4, execution=execution), CHIPS["cpu"], batch=1)
        assert plan.factored[0].execution == execution and execution in str(plan)
    assert "auto" in str(dense_plan(64, 64, 4))


def test_an_execution_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"unknown execution 'merge'; did you mean merged\?"):
        lr.Rule(".*", rank=1, execution="merge")


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_a_drop_in_module_runs_as_it_is_told(execution):
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 4)).astype(np.float32)
    layer = lr.LowRankConv(8, (3, 3), rank=2, method="random", execution=execution)

    @jax.jit
    def run(key, x):
        params = layer.init(key, x)["params"]
        expected = nn.Conv(8, (3, 3)).apply({"params": lr.merge(params)}, x)
        return params, layer.apply({"params": params}, x), expected

    params, y, expected = run(jax.random.key(1), x)
    assert params["kernel"].execution == execution
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


class Layer(nn.Module):
    """A convolution as networks have it."""

    features: int
    window: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (self.window, self.window), use_bias=False, dtype=x.dtype)(x)
        return nn.relu(nn.BatchNorm(use_running_average=False, dtype=x.dtype)(x))


def tpu_estimate(model, x, plan, placed):
    """Seconds of both gradients, by the TPU's compiler."""
    from lowrank_jax.experiment.preflight.compiler import compile_program

    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.eval_shape(lambda p: lr.factorize(p, plan, key=jax.random.key(0)), variables["params"])

    def loss(params, batch_stats, x):
        y, _ = lr.apply(model, {"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
        return y.astype(jnp.float32).sum()

    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), (params, variables["batch_stats"], x)
    )
    compiled = compile_program(jax.jit(jax.grad(loss, argnums=(0, 2))).lower(*arguments), CHIPS["v5e"])
    return compiled.cost.seconds


TWO_LAYERS = pytest.mark.parametrize(
    ("features", "window", "side", "rank", "faster"),
    [
        (256, 3, 14, 64, "factored"),
        (64, 3, 56, 16, "merged"),
        (256, 1, 28, 8, "merged"),
        (64, 1, 56, 1, "factored"),  # the output is not stored
    ],
)


def two_layers(features, window, side):
    model = nn.Sequential([Layer(features, window), Layer(features, window)])
    return model, jax.ShapeDtypeStruct((64, side, side, features), jnp.bfloat16)


@TWO_LAYERS
def test_the_choice_for_a_tpu(features, window, side, rank, faster):
    model, x = two_layers(features, window, side)
    plan = lr.plan(model, x, [lr.Rule(".*", rank=rank)])
    chosen = lr.choose_execution(plan, CHIPS["v5e"], batch=64, itemsize=2)
    assert {kernel.execution for kernel in chosen.factored} == {faster}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
@TWO_LAYERS
def test_the_choice_is_what_the_compiler_of_the_tpu_expects_to_be_faster(features, window, side, rank, faster):
    from lowrank_jax.experiment.preflight.compiler import topology

    placed = jax.sharding.SingleDeviceSharding(topology("v5e:2x2")[0])
    model, x = two_layers(features, window, side)
    estimates = {}
    for execution in ("factored", "merged"):
        plan = lr.plan(model, x, [lr.Rule(".*", rank=rank, execution=execution)])
        estimates[execution] = tpu_estimate(model, x, plan, placed)
    assert min(estimates, key=lambda execution: estimates[execution]) == faster


@pytest.mark.parametrize(
    ("chip", "settings", "error"),
    [
        ("v5e", {"batch": 8}, "chip must be one of lowrank_jax.chips.CHIPS, or None, not 'v5e'"),
        (CHIPS["v5e"], {"batch": 0}, "batch must be a whole number of at least 1, not 0"),
        (CHIPS["v5e"], {"batch": 2.5}, "batch must be a whole number of at least 1, not 2.5"),
        (None, {"batch": "64"}, "batch must be a whole number of at least 1, not '64'"),
        (CHIPS["v5e"], {"batch": 8, "itemsize": 0}, "itemsize must be a whole number of at least 1, not 0"),
    ],
)
def test_what_is_no_chip_or_no_count_is_refused(chip, settings, error):
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        lr.choose_execution(dense_plan(64, 64, 4), chip, **settings)


@pytest.fixture(scope="module")
def net_plan():
    return lr.plan(Net(), jnp.ones((2, 8, 8, 4)), [lr.Rule(".*kernel", scale=1.0)])


def test_the_rest_of_a_step_is_what_its_kernels_leave(net_plan):
    chip = CHIPS["v5e"]
    kernels = sum(dense_seconds(kernel, chip, 64, 2) for kernel in net_plan.kernels)
    assert kernels > 0
    np.testing.assert_allclose(rest_of_step(net_plan, 3 * kernels, chip, batch=64, itemsize=2), 2 * kernels, rtol=1e-9)
    assert rest_of_step(net_plan, kernels / 2, chip, batch=64, itemsize=2) == 0
    for step in (0, -1.0, math.nan, True, "1 s"):
        with pytest.raises(ValueError, match="must be seconds, a number above 0, or a compiled program"):
            rest_of_step(net_plan, step, chip, batch=64)


def test_a_compiled_step_has_the_operations_that_the_kernels_leave(net_plan):
    """Elementwise work of a known size on top of the dense network."""
    chip, batch = CHIPS["v5e"], 64
    x = jnp.ones((batch, 8, 8, 4))
    variables = Net().init(jax.random.key(0), x)

    def compiled(extra):
        def step(variables, x, more):
            grads = jax.grad(lambda variables, x: Net().apply(variables, x).sum(), argnums=(0, 1))(variables, x)
            return grads, jnp.cumsum(more)

        return jax.jit(step).lower(variables, x, jnp.ones(extra)).compile()

    small, large = (rest_of_step(net_plan, compiled(extra), chip, batch=batch) for extra in (1, 2**24))
    assert large - small > 0.5 * 2 * 4 * 2**24 / chip.bandwidth  # it is read and written


def test_with_its_rest_a_fraction_is_one_of_the_whole_step(net_plan):
    chip, batch = CHIPS["v5e"], 4096
    kernels = sum(dense_seconds(kernel, chip, batch, 2) for kernel in net_plan.kernels)
    rest = rest_of_step(net_plan, 2 * kernels, chip, batch=batch, itemsize=2)
    made = lr.allocate(net_plan, seconds=0.95, min_scale=0, chip=chip, batch=batch, itemsize=2, rest=rest)
    planned = rest
    for kernel in made.kernels:
        if kernel in made.factored:
            planned += seconds(kernel, kernel.execution, chip, batch, 2)
        else:
            planned += dense_seconds(kernel, chip, batch, 2)
    assert made.factored and planned <= 0.95 * 2 * kernels * (1 + 1e-9)
