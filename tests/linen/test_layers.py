"""A factored layer against the same layer on the merged kernel."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.kernel import channel_view, dense_view, spatial_view
from lowrank_jax.projection.matrix import spectral
from tests import drawn

KEY = jax.random.key(0)
PADDINGS = ["SAME", "VALID", 1, (1, 2), ((0, 2), (1, 0)), "CIRCULAR", "REFLECT"]


def normal(*shape, seed=2):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def factors(view, rank, seed=0):
    return view.from_factors(normal(view.n, rank, seed=seed) / np.sqrt(view.n), normal(rank, view.m, seed=seed + 1))


def assert_same(model, params, x, rtol=1e-5):
    @jax.jit  # one program, rather than one for every operation
    def run(params, x):
        executions = [dataclasses.replace(params["kernel"], execution=execution) for execution in ("factored", "merged")]
        ys = [lr.apply(model, {"params": {**params, "kernel": kernel}}, x) for kernel in executions]
        return model.apply({"params": lr.merge(params)}, x), ys

    expected, ys = run(params, x)
    for y in ys:
        assert y.dtype == expected.dtype
        np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@given(
    scheme=st.sampled_from([channel_view, spatial_view]),
    window=st.sampled_from([(3, 3), (1, 1), (3, 2), (1, 3)]),
    strides=st.sampled_from([1, 2, (1, 2), (2, 1)]),
    dilation=st.sampled_from([1, 2, (1, 2)]),
    padding=st.sampled_from(PADDINGS),
    use_bias=st.booleans(),
)
def test_convolutions_equal_the_merged_kernel(scheme, window, strides, dilation, padding, use_bias):
    view = scheme((*window, 4, 6))
    conv = nn.Conv(6, window, strides, padding, kernel_dilation=dilation, use_bias=use_bias)
    params = {"kernel": factors(view, 2)}
    if use_bias:
        params["bias"] = np.arange(6, dtype=np.float32)
    assert_same(conv, params, normal(2, 9, 8, 4))


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv(6, (3,), padding="CAUSAL", use_bias=False), (2, 9, 4)),
        (nn.Conv(6, 3, strides=2, use_bias=False), (2, 9, 4)),
        (nn.Conv(6, (2, 2, 2), use_bias=False), (2, 4, 4, 4, 4)),
        (nn.Conv(6, (3, 3), padding=1, input_dilation=2, use_bias=False), (2, 5, 5, 4)),
        (nn.Conv(6, (3, 3), use_bias=False), (5, 5, 4)),
        (nn.Conv(6, (1, 1), padding="VALID", use_bias=False), (2, 3, 5, 5, 4)),
        (nn.Conv(6, (1, 1), strides=(2, 3), use_bias=False), (2, 3, 6, 8, 4)),
    ],
)
def test_other_convolutions_equal_the_merged_kernel(conv, shape):
    kernel = drawn.variables(conv, np.zeros(shape, np.float32))["params"]["kernel"]
    assert_same(conv, {"kernel": factors(channel_view(kernel.shape), 2)}, normal(*shape))


@pytest.mark.parametrize(
    ("layer", "view", "shape"),
    [
        (nn.Dense(6), dense_view((4, 6)), (2, 3, 4)),
        (nn.DenseGeneral((2, 3)), dense_view((4, 2, 3)), (5, 4)),
        (nn.DenseGeneral(6, axis=(-2, -1)), dense_view((2, 3, 6), 2), (5, 2, 3)),
        (nn.DenseGeneral(6, axis=(1, 2)), dense_view((2, 3, 6), 2), (5, 2, 3)),
    ],
)
def test_dense_layers_equal_the_merged_kernel(layer, view, shape):
    bias = np.arange(6, dtype=np.float32).reshape(view.shape[len(view.rows) :])
    assert_same(layer, {"kernel": factors(view, 2), "bias": bias}, normal(*shape))


@pytest.mark.parametrize("scheme", [channel_view, spatial_view])
def test_full_rank_is_the_original_layer(scheme):
    conv = nn.Conv(6, (3, 3), strides=2)
    x = normal(2, 8, 8, 4)
    variables = drawn.variables(conv, x)
    view = scheme((3, 3, 4, 6))

    @jax.jit
    def run(variables, x):
        pair = view.from_factors(*spectral(view.to_matrix(variables["params"]["kernel"]), view.full_rank))
        return lr.apply(conv, {"params": {**variables["params"], "kernel": pair}}, x), conv.apply(variables, x)

    np.testing.assert_allclose(*run(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_low_precision_computes_in_low_precision(execution):
    layer = nn.Dense(6, dtype=jnp.bfloat16)
    kernel = dataclasses.replace(factors(dense_view((4, 6)), 2), execution=execution)

    def run(x):
        return lr.apply(layer, {"params": {"kernel": kernel, "bias": jnp.zeros(6)}}, x)

    products = [eqn for eqn in jax.make_jaxpr(run)(jnp.ones((2, 4))).eqns if eqn.primitive.name == "dot_general"]
    assert [eqn.outvars[0].aval.dtype for eqn in products] == [jnp.bfloat16] * 2


@pytest.mark.parametrize(("execution", "formed"), [("factored", False), ("merged", True)])
def test_only_a_merged_kernel_forms_the_product(execution, formed):
    layer = nn.Dense(307, use_bias=False)
    kernel = dataclasses.replace(factors(dense_view((301, 307)), 2), execution=execution)
    jaxpr = jax.make_jaxpr(lambda p, x: jax.grad(lambda p: lr.apply(layer, {"params": p}, x).sum())(p))(
        {"kernel": kernel}, jnp.ones((2, 301))
    )
    assert ("301,307" in str(jaxpr)) == formed


class Classifier(nn.Module):
    """The two drop-in modules and their plain twins."""

    low_rank: bool

    @nn.compact
    def __call__(self, x):
        if self.low_rank:
            conv = lr.LowRankConv(8, (3, 3), rank=3, strides=2, scheme="spatial", name="conv")
            dense = lr.LowRankDense(5, rank=2, method="spectral", name="dense")
        else:
            conv, dense = nn.Conv(8, (3, 3), strides=2, name="conv"), nn.Dense(5, name="dense")
        return dense(nn.relu(conv(x)).mean((1, 2)))


def test_drop_in_modules_hold_what_factorize_leaves():
    x = normal(2, 8, 8, 3)
    low, plain = Classifier(True), Classifier(False)
    rules = [lr.Rule("conv/kernel", rank=3, scheme="spatial"), lr.Rule("dense/kernel", rank=2)]
    plan = lr.plan(plain, x, rules)
    planned = jax.eval_shape(lambda x: lr.factorize(plain.init(KEY, x)["params"], plan, key=KEY), x)

    @jax.jit
    def run(x):
        params = low.init(KEY, x)["params"]
        on_factors = [low.apply({"params": params}, x), lr.apply(plain, {"params": params}, x)]
        return params, on_factors, plain.apply({"params": lr.merge(params)}, x)

    params, on_factors, expected = run(x)
    assert jax.tree.structure(params) == jax.tree.structure(planned)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, planned)
    for logits in on_factors:
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [lr.LowRankDense(5, rank=9), lr.LowRankConv(5, (3, 3), rank=6)])
def test_a_drop_in_module_refuses_a_rank_above_full(layer):
    with pytest.raises(ValueError, match="must be a whole number from 1 to"):
        jax.eval_shape(layer.init, KEY, np.ones((1, 4, 4, 3), np.float32))
