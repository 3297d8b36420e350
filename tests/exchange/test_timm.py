"""Random weights of timm's models, copied: the logits agree.  `python -m scripts.timm_parity` does it at full size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.exchange.timm import TWINS, from_timm, pixels, twin
from lowrank_jax.paths import named_leaves
from scripts import timm_parity

try:
    timm, torch = timm_parity.import_timm()
    reason = ""
except ImportError as error:
    timm = torch = None
    reason = str(error)

needs_timm = pytest.mark.skipif(timm is None, reason=reason)
SLOW = (
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "tf_efficientnet_lite0",
    "vit_small_patch16_224",
    "vit_small_patch32_224",
    "wide_resnet50_2",
)


def state_of(name, size=64):
    return {key: value.numpy() for key, value in timm_parity.randomised(name, size, 0).state_dict().items()}


def blank_state_of(name):
    """Of the right shapes, without drawing or holding numbers."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=1000)
    return {key: np.broadcast_to(np.float32(1), tuple(value.shape)) for key, value in model.state_dict().items()}


@functools.cache
def shapes_of(name, size=64):
    model = twin(name, num_classes=1000)
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def drawn(shapes):
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in named_leaves(shapes).items()}


def small_state():
    """ResNet-18 in timm's names, without timm: of every array its place here is known."""
    names = {}
    for path, value in drawn(shapes_of("resnet18")).items():
        _, *layers, leaf = path.split("/")
        for here, there in (("stem", ""), ("norm", "bn1"), ("conv", "conv1"), ("head", "fc")):
            layers = [there if layer == here else layer for layer in layers]
        name = ".".join(filter(None, layers)).replace("stage", "layer").replace("proj_norm", "downsample.1")
        name = name.replace("proj", "downsample.0").replace("norm", "bn")
        for block in (1, 2):
            name = name.replace(f".block{block}.", f".{block - 1}.")
        leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(leaf, leaf)
        names[f"{name}.{leaf}"] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return names


@needs_timm
@pytest.mark.parametrize("name", ["resnet50", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_logits_are_timms(name):
    parity = timm_parity.compare(name, 64)
    assert parity.logits > 0.1
    assert parity.difference < timm_parity.TOLERANCE * max(1.0, parity.logits)


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_lite0"])
def test_the_comparison_notices_another_padding(name):
    other = "same" if name == "efficientnet_b0" else "symmetric"
    assert timm_parity.compare(name, 64, padding=other).difference > 0.01


def test_the_script_compares_a_member_of_every_family():
    assert set(timm_parity.DEFAULT) <= TWINS.keys()
    ours = {TWINS[name][0] for name in timm_parity.DEFAULT}
    assert {f"efficientnet_lite{size}" for size in range(5)} | {"wide_resnet50_2", "wide_resnet101_2"} <= ours
    assert {f"vit_{size}{patch}" for size in "sbl" for patch in (16, 32)} <= ours


# --- Names and places.


@needs_timm
def test_the_names_without_timm_are_timms():
    wanted = {name: value.shape for name, value in state_of("resnet18").items() if not name.endswith("tracked")}
    assert {name: value.shape for name, value in small_state().items()} == wanted


def test_every_array_has_its_place():
    found = from_timm(small_state(), shapes_of("resnet18"))
    jax.tree.map(np.testing.assert_array_equal, named_leaves(found), drawn(shapes_of("resnet18")))


def test_weights_of_another_model_are_refused():
    state = small_state()
    with pytest.raises(ValueError, match=r"^the weights do not fit the model:\n") as caught:
        from_timm(state, shapes_of("resnet50"))
    lines = str(caught.value).splitlines()
    assert "  params/stage1/block1/conv3/kernel: has no array" in lines
    assert "  params/stage1/block1/conv1/kernel: is [3, 3, 64, 64], not [1, 1, 64, 64]" in lines
    with pytest.raises(ValueError) as caught:
        from_timm({name: value for name, value in state.items() if name != "fc.bias"}, shapes_of("resnet18"))
    assert str(caught.value) == "the weights do not fit the model:\n  params/head/bias: has no array"
    with pytest.raises(ValueError) as caught:
        from_timm({**state, "extra.weight": np.ones(3)}, shapes_of("resnet18"))
    assert (
        str(caught.value)
        == "the weights do not fit the model:\n  params/extra/scale: is left over; did you mean params/stem/norm/scale?"
    )


@needs_timm
def test_weights_of_a_larger_model_are_refused():
    with pytest.raises(ValueError, match=r"params/stage1/block1/conv3/kernel: is left over; did you mean params/stage1/block"):
        from_timm(blank_state_of("resnet50"), shapes_of("resnet18"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fc.weight": np.ones((512, 1000))}, r"params/head/kernel: is \[1000, 512\], not \[512, 1000\]"),  # the same size
        ({"fc.weight": np.ones((500, 1024))}, r"params/head/kernel: is \[1024, 500\], not \[512, 1000\]"),
        ({"fc.weight": np.ones((1000, 512, 1))}, r"params/head/kernel: is \[1000, 512, 1\], not \[512, 1000\]"),
        ({"fc.weight": np.ones(())}, r"params/head/kernel: is \[\], not \[512, 1000\]"),
        ({"fc.weight": np.ones((1000, 512), int)}, "params/head/kernel: is int64, not float32"),
        ({"fc.weight": np.ones((1000, 512), bool)}, "params/head/kernel: is bool, not float32"),
        ({"fc.weight": np.ones((1000, 512), complex)}, "params/head/kernel: is complex128, not float32"),
        ({"fc.weight": np.full((1000, 512), 1e300)}, "has values that are too large for float32"),
        ({"fc.bias": np.full(1000, np.inf)}, "params/head/bias: has values that are not finite"),
        ({"attn.qkv.weight": np.ones((4, 2))}, "params/attn.qkv/kernel: is left over"),
        ({"attn.qkv.bias": np.ones(())}, "params/attn.qkv/bias: is left over"),
        ({"layer1." + "9" * 5000 + ".bn1.bias": np.ones(3)}, "is left over"),
        ({"": np.ones(3)}, "params//: is left over"),
        ({"": np.ones(3), ".": np.ones(3)}, "are both params//"),
        ({"head.weight": np.ones((1000, 512))}, "fc.weight and head.weight are both params/head/kernel"),
    ],
)
def test_arrays_that_have_no_place_are_told(changed, message):
    with pytest.raises(ValueError, match=message):
        from_timm({**small_state(), **changed}, shapes_of("resnet18"))


def test_arrays_of_sixteen_bits_are_taken():
    halves = {name: value.astype(np.float16) for name, value in small_state().items()}
    found = named_leaves(from_timm(halves, shapes_of("resnet18")))
    assert all(leaf.dtype == np.float32 for leaf in found.values())
    np.testing.assert_array_equal(found["params/head/bias"], halves["fc.bias"].astype(np.float32))


def test_twins_are_found_by_name():
    assert twin("tf_efficientnet_b3.ns_jft_in1k", num_classes=10).padding == "same"
    assert twin("efficientnet_b3", num_classes=10).padding == "symmetric"
    with pytest.raises(ValueError, match="no model here corresponds to timm's 'resnet51'; did you mean resnet50"):
        twin("resnet51", num_classes=10)
    assert "vit_base_patch16_224" in TWINS


FAST = ("resnet18", "tf_efficientnet_lite0", "vit_small_patch32_224")


@needs_timm
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TWINS])
def test_every_twin_has_the_arrays_of_timms_model(name):
    shapes = shapes_of(name, 224)
    found = from_timm(blank_state_of(name), shapes)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, shapes)


@needs_timm
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "tf_efficientnet_lite0",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("wide_resnet50_2", "vit_small_patch32_224", "efficientnet_b0")
        ),
    ],
)
def test_weights_of_every_family_have_a_place(name):
    shapes = shapes_of(name)
    state = state_of(name)
    found = from_timm(state, shapes)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    kept = sum(float(np.abs(leaf).sum(dtype=np.float64)) for leaf in jax.tree.leaves(found))
    given = sum(float(np.abs(value).sum(dtype=np.float64)) for key, value in state.items() if not key.endswith("tracked"))
    assert kept == pytest.approx(given)


@needs_timm
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_of_pytorch_is_the_models_weights(tmp_path, zipped):
    state = {name: torch.from_numpy(value.copy()) for name, value in small_state().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    model, images = twin("resnet18", num_classes=1000), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    found = lr.load(f"timm:resnet18.a1_in1k={tmp_path / 'w.pth'}", model, images=images)
    jax.tree.map(np.testing.assert_array_equal, named_leaves(found), drawn(shapes_of("resnet18")))


def in_the_names_of_efficientnet_pytorch(state):
    """timm's names of an EfficientNet in those of the other package: both write the layers in one order."""
    blocks = sorted({tuple(map(int, name.split(".")[1:3])) for name in state if name.startswith("blocks.")})
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    others = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    others |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    renamed = {}
    for name, value in state.items():
        layer, leaf = name.rsplit(".", 1)
        if not name.startswith("blocks."):
            renamed[f"{outside[layer]}.{leaf}"] = value
            continue
        _, stage, block, layer = layer.split(".")
        layers = first if stage == "0" else others
        renamed[f"_blocks.{blocks.index((int(stage), int(block)))}.{layers[layer]}.{leaf}"] = value
    return renamed


@needs_timm
def test_the_names_of_efficientnet_pytorch_lead_to_the_same_places():
    state, shapes = state_of("tf_efficientnet_lite0"), shapes_of("tf_efficientnet_lite0")
    renamed = in_the_names_of_efficientnet_pytorch(state)
    assert len(renamed) == len(state)
    jax.tree.map(np.testing.assert_array_equal, from_timm(renamed, shapes), from_timm(state, shapes))
    with pytest.raises(ValueError, match="params/block 16/expand/kernel: is left over"):
        from_timm({**renamed, "_blocks.16._expand_conv.weight": np.ones((2, 2, 1, 1))}, shapes)


# --- Pixels.


def test_pixels_by_name():
    half, imagenet = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name in ("tf_efficientnet_lite0", "vit_small_patch16_224", "vit_base_patch32_224", "tf_efficientnet_b0.ap_in1k"):
        assert pixels(name) == half, name
    for name in ("resnet50", "tf_efficientnet_b0", "tf_efficientnet_b0.ns_jft_in1k", "vit_base_patch16_224.dino"):
        assert pixels(name) == imagenet, name
    with pytest.raises(ValueError, match="no model here corresponds to timm's 'resnet51'"):
        pixels("resnet51")


@needs_timm
def test_pixels_are_timms():
    from timm.models import get_pretrained_cfg

    tagged = [name for name in timm.list_pretrained() if name.split(".")[0] in TWINS]
    assert len(tagged) > len(TWINS) / 2
    for name in (*TWINS, *tagged):
        known = get_pretrained_cfg(name)
        assert known is None or pixels(name) == (tuple(known.mean), tuple(known.std)), name
