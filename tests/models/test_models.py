import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.paths import named_leaves


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
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_published_parameter_counts(name, published):
    assert parameters(models.build(name, num_classes=1000), 224) == published


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
    params = shapes(model, 32)["params"]
    values = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert jax.tree.map(jnp.shape, values) == jax.tree.map(lambda leaf: leaf.shape, params)
    np.testing.assert_array_equal(values["stage1"]["block1"]["norm2"]["scale"], 0)
    np.testing.assert_array_equal(values["stage1"]["block1"]["norm1"]["scale"], 1)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mlp", {}),
        ("mlp", {"batch_norm": True, "dropout": 0.5, "widths": (16, 8)}),
        ("resnet8", {}),
        ("resnet8", {"norm": "none"}),
        ("resnet18", {"stem": "cifar", "widths": (8, 8, 8, 8), "dtype": jnp.bfloat16}),
        ("resnet50", {"widths": (8, 8, 8, 8)}),
    ],
)
def test_models_give_finite_logits_in_training_and_evaluation(name, kwargs):
    model = models.build(name, num_classes=7, **kwargs)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = model.init(jax.random.key(1), x)
    for train in (False, True):
        logits, _ = model.apply(variables, x, train=train, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})
        assert logits.shape == (2, 7)
        assert np.isfinite(np.asarray(logits, np.float32)).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_models_from_elsewhere_are_found_by_path():
    model = models.build("lowrank_jax.models.mlp:MLP", num_classes=3, widths=(4,))
    assert isinstance(model, models.MLP)
    assert "widths" in (models.settings("lowrank_jax.models.mlp:MLP") or {})


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
