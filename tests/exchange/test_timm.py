"""Random weights of timm's models, copied: the logits agree.  `python -m scripts.timm_parity` does it at full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.exchange.timm import TWINS, from_timm, twin
from scripts import timm_parity

try:
    timm_parity.import_timm()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SLOW = ("efficientnet_b0", "tf_efficientnet_b0", "vit_small_patch16_224")


def state_of(name):
    return {key: value.numpy() for key, value in timm_parity.randomised(name, 64, 0).state_dict().items()}


def shapes_of(name):
    return jax.eval_shape(twin(name, num_classes=1000).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize("name", ["resnet50", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_logits_are_timms(name):
    parity = timm_parity.compare(name, 64)
    assert parity.logits > 0.1
    assert parity.difference < timm_parity.TOLERANCE


@pytest.mark.slow
def test_the_comparison_notices_another_padding():
    assert timm_parity.compare("efficientnet_b0", 64, padding="same").difference > 0.01


def test_weights_of_another_model_are_refused():
    state = state_of("resnet18")
    with pytest.raises(ValueError, match=r"stage1/block1/conv1/kernel, \[1, 1, 64, 64\]\n"):
        from_timm(state, shapes_of("resnet50"))
    with pytest.raises(ValueError, match=r"params/head/bias: no array maps to it$"):
        from_timm({name: value for name, value in state.items() if name != "fc.bias"}, shapes_of("resnet18"))
    with pytest.raises(ValueError, match=r"extra\.weight: maps to params/extra/scale, which the model does not have$"):
        from_timm({**state, "extra.weight": np.ones(3)}, shapes_of("resnet18"))


def test_twins_are_found_by_name():
    assert twin("tf_efficientnet_b3.ns_jft_in1k", num_classes=10).padding == "same"
    assert twin("efficientnet_b3", num_classes=10).padding == "symmetric"
    with pytest.raises(ValueError, match="no model here corresponds to timm's 'resnet51'; did you mean resnet50"):
        twin("resnet51", num_classes=10)
    assert "vit_base_patch16_224" in TWINS


@pytest.mark.parametrize("name", [pytest.param("efficientnet_b0", marks=pytest.mark.slow), "vit_small_patch16_224"])
def test_weights_of_every_family_have_a_place(name):
    shapes = shapes_of(name)
    found = from_timm(state_of(name), shapes)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, shapes)
