import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.experiment.config.files import ConfigError, default
from lowrank_jax.experiment.config.parse import parse
from lowrank_jax.paths import named_leaves
from tests import drawn


def shapes(model, size, channels=3):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, channels))))


def parameters(model, size):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, size)["params"]))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        pytest.param("resnet101", 44_549_160, marks=pytest.mark.slow),
        pytest.param("resnet152", 60_192_808, marks=pytest.mark.slow),
        ("efficientnet_b0", 5_288_548),
        ("efficientnet_b1", 7_794_184),
        pytest.param("efficientnet_b4", 19_341_616, marks=pytest.mark.slow),
        pytest.param("efficientnet_b7", 66_347_960, marks=pytest.mark.slow),
        ("vit_s16", 22_050_664),
        pytest.param("vit_b16", 86_567_656, marks=pytest.mark.slow),
    ],
)
def test_published_parameter_counts(name, published):
    assert parameters(models.build(name, num_classes=1000), 224) == published


@pytest.mark.parametrize(("name", "published"), [("wrn_16_4", 2_748_890), ("wrn_28_10", 36_479_194)])
def test_published_parameter_counts_on_cifar(name, published):
    assert parameters(models.build(name, num_classes=10), 32) == published


@pytest.mark.parametrize(("scale", "kernels"), [(0.10, 4.92e6), (0.25, 9.21e6), (None, 25.50e6)])
def test_golden_sizes_of_low_rank_resnet50(scale, kernels):
    """Convolution and dense kernels; every convolution but the stem factored, the head kept."""
    rules = [lr.Rule("(stem/conv|head)/kernel"), lr.Rule(".*", scale=scale)]
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    plan = lr.plan(models.build("resnet50", num_classes=1000), image, rules)
    planned = sum(kernel.planned_params for kernel in plan.kernels)
    assert abs(planned - kernels) < 0.005e6
    assert round(plan.dense_macs / 1e9, 2) == 4.09  # as published, at 224 x 224


def test_a_bottleneck_strides_in_its_3x3():
    model = models.build("resnet50", num_classes=10, blocks=(1, 1, 1, 1))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    macs = {kernel.name: kernel.macs for kernel in lr.plan(model, image, []).kernels}
    assert macs["stage2/block1/conv1/kernel"] == 16 * 16 * 256 * 128  # not yet strided
    assert macs["stage2/block1/conv2/kernel"] == 8 * 8 * 9 * 128 * 128


@pytest.mark.parametrize("depth", [8, 20, 32, 56])
def test_the_cifar_family_has_its_depth(depth):
    leaves = named_leaves(shapes(models.build(f"resnet{depth}", num_classes=10), 32)["params"])
    layers = [name for name in leaves if name.endswith("/kernel") and "proj" not in name]
    assert len(layers) == depth


def test_a_zero_last_norm_makes_blocks_identities():
    model = models.build("resnet20", num_classes=10, zero_init_last_norm=True)

    @jax.jit
    def scales():  # alone: what draws the kernels is not compiled
        params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        return {name: leaf for name, leaf in named_leaves(params).items() if name.endswith("/scale")}

    values = scales()
    assert sum(name.endswith("norm2/scale") for name in values) == 9
    for name, scale in values.items():
        np.testing.assert_array_equal(scale, 0 if name.endswith("norm2/scale") else 1, err_msg=name)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mlp", {}),
        ("mlp", {"batch_norm": True, "dropout": 0.5, "widths": (16, 8)}),
        ("resnet8", {}),
        ("resnet8", {"norm": "none"}),
        ("resnet18", {"stem": "cifar", "blocks": (1, 2), "widths": (8, 8), "dtype": jnp.bfloat16}),
        ("resnet50", {"blocks": (2, 1), "widths": (8, 8)}),
        ("wrn_16_4", {"depth": 10, "widening": 1, "dropout": 0.3}),
        pytest.param(
            "wrn_16_4",
            {"depth": 10, "widening": 1, "dtype": jnp.bfloat16},
            marks=pytest.mark.xfail(
                jax.__version_info__ >= (0, 12),
                reason="XLA:CPU makes NaN of it; not without YNNPACK's fusions (--xla_cpu_experimental_ynn_fusion_type=)",
                strict=True,  # so that its end is noticed
            ),
        ),
        ("efficientnet_b0", {"width": 0.1, "depth": 0.1}),
        pytest.param(
            "efficientnet_b0",
            {"width": 0.1, "depth": 0.1, "squeeze_excite": False, "stem": "cifar", "dtype": jnp.bfloat16},
            marks=pytest.mark.slow,
        ),
        ("vit_s16", {"width": 16, "depth": 2, "heads": 2, "patch": 8, "dropout": 0.1, "stochastic_depth": 0.5}),
        ("vit_s16", {"width": 16, "depth": 1, "heads": 2, "patch": 8, "attention_dropout": 0.1, "pool": "mean"}),
        ("vit_s16", {"width": 16, "depth": 1, "heads": 2, "patch": 8, "positions": "sincos", "dtype": jnp.bfloat16}),
    ],
)
def test_models_give_finite_logits_and_only_training_is_random(name, kwargs):
    model = models.build(name, num_classes=7, **kwargs)
    x = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
    variables = drawn.variables(model, x)
    evaluate = jax.jit(model.apply)
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    first, again, other = (train(variables, x, rngs={"dropout": jax.random.key(seed)})[0] for seed in (0, 0, 1))
    evaluated = evaluate(variables, x)  # no rngs given
    for logits in (first, evaluated):
        assert logits.shape == (4, 7)
        assert logits.dtype == jnp.float32
        assert np.isfinite(np.asarray(logits, np.float32)).all()
    np.testing.assert_array_equal(evaluated, evaluate(variables, x))
    np.testing.assert_array_equal(first, again)
    drops = any(getattr(model, rate, 0) for rate in ("dropout", "drop_connect", "attention_dropout", "stochastic_depth"))
    assert bool(np.any(first != other)) == drops
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes(model, 16)))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet8", {}),
        ("efficientnet_b0", {"width": 0.1, "depth": 0.1}),
        ("vit_s16", {"width": 16, "depth": 1, "heads": 2, "patch": 8}),
    ],
)
def test_bfloat16_is_for_the_body_and_not_for_softmax_nor_logits(name, kwargs):
    model = models.build(name, num_classes=7, dtype=jnp.bfloat16, **kwargs)
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    text = str(jax.make_jaxpr(model.apply)(variables, x))
    assert "bf16" in text and not re.search(r":bf16\S* = exp ", text)
    products = re.findall(r":(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)", text)
    assert products[-1] == "f32" and set(products[:-1]) <= {"bf16", "f32"} and products.count("bf16") > 4


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("wrn_16_4", {"depth": 15}, "depth 15 must be 6 n"),
        ("wrn_16_4", {"dropout": 1.0}, r"setting dropout: 1.0; must be in \[0, 1\)"),
        ("efficientnet_b0", {"drop_connect": -0.1}, "setting drop_connect: -0.1; must be in"),
        ("vit_s16", {"stochastic_depth": 2.0}, "setting stochastic_depth: 2.0; must be in"),
        ("vit_s16", {"patch": 5}, "images of 32 x 32 cannot be divided into patches of 5 x 5"),
        ("vit_s16", {"width": 6, "positions": "sincos"}, "width 6 must be a multiple of 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        shapes(models.build(name, num_classes=10, **kwargs), 32)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("efficientnet_b0", "padding", "valid", "one of 'same', 'symmetric'"),
        ("efficientnet_b0", "squeeze_excite", 1, "True or False"),
        ("wrn_28_10", "dropout", "0.3", "a number"),
        ("vit_s16", "pool", "max", "one of 'token', 'mean'"),
        ("vit_s16", "paatch", 8, "did you mean patch"),
    ],
)
def test_a_config_judges_the_settings(name, key, value, message):
    config = default()
    config.update({"steps": 1, "model": {"name": name, "kwargs": {key: value}}})
    with pytest.raises(ConfigError) as error:
        parse(config)
    assert any(problem.startswith(f"model.kwargs.{key}: ") and message in problem for problem in error.value.problems)


def test_models_from_elsewhere_are_found_by_path():
    model = models.build("lowrank_jax.models.mlp:MLP", num_classes=3, widths=(4,))
    assert isinstance(model, models.MLP)
    assert "widths" in (models.settings("lowrank_jax.models.mlp:MLP") or {})


def test_the_settings_of_what_is_no_class_with_fields_are_not_known():
    assert models.settings("flax.linen:Module") is None
    assert models.settings("lowrank_jax.models:build") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", "unknown model 'resnet5'; did you mean resnet5"),
        ("nowhere.models:Net", "cannot be imported: No module named 'nowhere'"),
        ("lowrank_jax.models.mlp:Nlp", "cannot be imported"),
    ],
)
def test_unknown_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, num_classes=3)
