import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.models import efficientnet
from lowrank_jax.models.common import stochastic_depth
from lowrank_jax.paths import named_leaves
from tests import drawn


def image(size):
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def shapes(model, size=32):
    return jax.eval_shape(model.init, jax.random.key(0), image(size))


def test_multiply_adds_of_b0():
    """0.39 G as published; depthwise kernels and squeeze-and-excitation count."""
    plan = lr.plan(models.build("efficientnet_b0", num_classes=1000), image(224), [])
    assert round(plan.dense_macs / 1e9, 2) == 0.39
    macs = {kernel.name: kernel.macs for kernel in plan.kernels}
    assert macs["stage1/block1/depthwise/kernel"] == 112 * 112 * 9 * 32
    assert macs["stage2/block1/se/reduce/kernel"] == 96 * 4


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("b0", (1.0, 1.0, 224, 0.2)),
        ("b1", (1.0, 1.1, 240, 0.2)),
        ("b2", (1.1, 1.2, 260, 0.3)),
        ("b3", (1.2, 1.4, 300, 0.3)),
        ("b4", (1.4, 1.8, 380, 0.4)),
        ("b5", (1.6, 2.2, 456, 0.4)),
        ("b6", (1.8, 2.6, 528, 0.5)),
        ("b7", (2.0, 3.1, 600, 0.5)),
        ("b8", (2.2, 3.6, 672, 0.5)),
        ("l2", (4.3, 5.3, 800, 0.5)),
    ],
)
def test_members_of_the_family_are_scaled_as_published(size, published):
    model = models.build(f"efficientnet_{size}", num_classes=10)
    resolution = efficientnet.VARIANTS[f"efficientnet_{size}"].resolution
    assert (model.width, model.depth, resolution, model.dropout) == published


def test_b9_goes_on_as_the_family_ends():
    b7, b8, b9 = (efficientnet.VARIANTS[f"efficientnet_b{size}"] for size in (7, 8, 9))
    assert b9.resolution - b8.resolution == b8.resolution - b7.resolution
    assert math.isclose(b9.width - b8.width, b8.width - b7.width)
    assert math.isclose(b9.depth - b8.depth, b8.depth - b7.depth)


def test_b4_has_as_many_blocks_and_channels_as_published():
    params = shapes(models.build("efficientnet_b4", num_classes=10))["params"]
    stages = [params[f"stage{i}"] for i in range(1, 8)]
    assert [len(stage) for stage in stages] == [2, 4, 4, 6, 6, 8, 2]
    assert [stage["block1"]["project"]["kernel"].shape[-1] for stage in stages] == [24, 32, 56, 112, 160, 272, 448]
    assert params["stem"]["conv"]["kernel"].shape[-1] == 48
    assert params["top"]["conv"]["kernel"].shape == (1, 1, 448, 1792)


def test_channels_lose_no_more_than_a_tenth():
    assert [efficientnet.round_features(40, width) for width in (0.1, 0.25, 1.0, 1.1, 2.0)] == [8, 16, 40, 48, 80]


def test_squeeze_and_excitation_is_a_quarter_of_the_blocks_inputs_or_off():
    params = shapes(models.build("efficientnet_b0", num_classes=10))["params"]
    assert params["stage3"]["block2"]["se"]["reduce"]["kernel"].shape == (6 * 40, 40 // 4)
    assert params["stage3"]["block2"]["se"]["excite"]["kernel"].shape == (40 // 4, 6 * 40)
    without = shapes(models.build("efficientnet_b0", num_classes=10, squeeze_excite=False))["params"]
    assert set(named_leaves(without)) == {name for name in named_leaves(params) if "/se/" not in name}


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("size", "strides", "agree"), [(9, 2, True), (8, 2, False), (9, 1, True), (8, 1, True)])
def test_paddings_differ_where_a_stride_meets_an_even_size(size, strides, kernel, agree):
    x = np.random.default_rng(0).standard_normal((1, size, size, 3)).astype(np.float32)
    same, symmetric = (efficientnet._conv(4, kernel, strides, padding=padding) for padding in ("same", "symmetric"))
    variables = drawn.variables(same, x)
    outputs = jax.jit(lambda variables: (same.apply(variables, x), symmetric.apply(variables, x)))(variables)
    assert np.allclose(*outputs, atol=1e-5) == agree


def test_initial_kernels_have_the_published_spread():
    """Two over the fan out, a depthwise kernel's being its window; the head is uniform."""
    conv = functools.partial(efficientnet._conv, padding="same")
    norm = functools.partial(nn.BatchNorm, use_running_average=False)
    block = efficientnet.MBConv(64, 5, 1, 6, 0.0, True, conv, norm, nn.silu, train=True, dtype=None)

    @jax.jit
    def init(key):
        return block.init(key, jnp.zeros((1, 1, 1, 112)))["params"], efficientnet.head_uniform(key, (1280, 1000))

    params, head = init(jax.random.key(0))
    for name, fan_out in (("expand", 672), ("depthwise", 25), ("project", 64)):
        assert np.std(params[name]["kernel"]) == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    assert np.std(params["se"]["excite"]["kernel"]) == pytest.approx(math.sqrt(2 / 672), rel=0.03)
    assert np.abs(head).max() == pytest.approx(1 / math.sqrt(1000), rel=0.001)


def test_stochastic_depth_keeps_the_expectation_and_examples_whole():
    x = np.ones((20_000, 2, 3), np.float32)

    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return stochastic_depth(x, 0.25, train)

    dropped = np.asarray(jax.jit(lambda x: Branch().apply({}, x, True, rngs={"dropout": jax.random.key(0)}))(x))
    assert dropped.mean() == pytest.approx(1, abs=0.02)  # four standard deviations of the mean are 0.016
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (dropped == dropped[:, :1, :1]).all()
    np.testing.assert_array_equal(Branch().apply({}, x, False), x)


def test_drop_rates_rise_linearly_over_all_blocks():
    model = models.build("efficientnet_b0", num_classes=10, drop_connect=0.32)
    rates = [rate for stage in model._drop_rates() for rate in stage]
    np.testing.assert_allclose(rates, 0.02 * np.arange(16))


RULES = [
    lr.Rule("(stem/conv|head)/kernel"),
    lr.Rule(".*/depthwise/kernel", scale=0.25),
    lr.Rule(".*/expand/kernel", scale=0.25, activation="silu"),
    lr.Rule(".*/project/kernel", scale=0.25, activation="identity"),
    lr.Rule("top/conv/kernel", scale=0.25, activation="silu"),
]


def test_rules_tell_the_kernels_of_b0_apart():
    rules = [lr.Rule(".*/se/.*/kernel"), *RULES]
    plan = lr.plan(models.build("efficientnet_b0", num_classes=1000), image(224), rules)
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    depthwise = [kernel for name, kernel in kernels.items() if "/depthwise/" in name]
    assert len(depthwise) == 16
    assert all(kernel.note == "depthwise convolution" for kernel in depthwise)
    assert {name.rsplit("/", 2)[-2] for name in (kernel.name for kernel in plan.factored)} == {"expand", "project", "conv"}
    assert len(plan.factored) == 15 + 16 + 1
    assert kernels["top/conv/kernel"].rank == 80
    assert kernels["stage3/block2/se/excite/kernel"].note == "kept dense by rule 1"
    assert plan.params < 0.65 * plan.dense_params


def test_squeeze_and_excitation_is_factored_when_a_rule_says_so():
    rules = [
        lr.Rule(".*/se/reduce/kernel", scale=0.25, activation="silu"),
        lr.Rule(".*/se/excite/kernel", scale=0.25, activation="sigmoid"),
        *RULES,
    ]
    plan = lr.plan(models.build("efficientnet_b0", num_classes=1000), image(224), rules)
    assert sum("/se/" in kernel.name for kernel in plan.factored) == 2 * 16
