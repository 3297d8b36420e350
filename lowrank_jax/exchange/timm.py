"""Weights of timm's PyTorch models as variables of the models here.  Numpy in, numpy out: neither torch nor timm is imported.

    state = {name: value.numpy() for name, value in timm_model.state_dict().items()}
    model = twin("tf_efficientnet_b0.ns_jft_in1k", num_classes=1000)
    variables = from_timm(state, jax.eval_shape(model.init, jax.random.key(0), images))

Trained weights (`timm.create_model(..., pretrained=True)`) convert like random ones; it is timm that downloads them, never this
module.  The images are to be normalised as the model's `pretrained_cfg` in timm says, which differs from model to model.
"""

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from lowrank_jax import models
from lowrank_jax.exchange.fit import fitted
from lowrank_jax.paths import named_leaves
from lowrank_jax.text import did_you_mean, one_line

# timm's name, up to a dot: the name here and the settings in which the two differ.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in (*(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)), "wide_resnet50_2", "wide_resnet101_2")
    },
    **{f"tf_efficientnet_{size}": (f"efficientnet_{size}", {}) for size in (*(f"b{i}" for i in range(9)), "l2")},
    **{
        f"efficientnet_{size}": (f"efficientnet_{size}", {"padding": "symmetric", "epsilon": 1e-5})
        for size in (*(f"b{i}" for i in range(9)), "l2")
    },
    **{f"tf_efficientnet_lite{size}": (f"efficientnet_lite{size}", {}) for size in range(5)},
    **{
        f"vit_{size}_patch{patch}_224": (f"vit_{size[0]}{patch}", {})
        for size in ("small", "base", "large")
        for patch in (16, 32)
    },
}

# How a repeated part is numbered there, and its path here.
_REPEATED: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"layer(\d{1,6})\.(\d{1,6})\.", lambda stage, block: f"stage{stage}/block{block + 1}/"),
    (r"blocks\.(\d{1,6})\.(\d{1,6})\.", lambda stage, block: f"stage{stage + 1}/block{block + 1}/"),
    (r"blocks\.(\d{1,6})\.", lambda block: f"block{block + 1}/"),
)

# The layers of each family there and here; what has one name in both is left out.
_RESNET = {"conv1": "stem/conv", "bn1": "stem/norm", "fc": "head"}
_RESNET_BLOCK = {"bn1": "norm1", "bn2": "norm2", "bn3": "norm3", "downsample.0": "proj", "downsample.1": "proj_norm"}
_EFFICIENTNET = {"conv_stem": "stem/conv", "bn1": "stem/norm", "conv_head": "top/conv", "bn2": "top/norm", "classifier": "head"}
_SQUEEZE = {"se.conv_reduce": "se/reduce", "se.conv_expand": "se/excite"}
_MBCONV = {
    "conv_pw": "expand",
    "bn1": "expand_norm",
    "conv_dw": "depthwise",
    "bn2": "depthwise_norm",
    "conv_pwl": "project",
    "bn3": "project_norm",
    **_SQUEEZE,
}
# Blocks that do not expand are of another class there, with other names for the same layers.
_MBCONV_UNEXPANDED = {"conv_dw": "depthwise", "bn1": "depthwise_norm", "conv_pw": "project", "bn2": "project_norm", **_SQUEEZE}
_VIT = {"patch_embed.proj": "embed"}
_VIT_BLOCK = {"attn.proj": "attention/out", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}

# EfficientNets in the names of the package efficientnet_pytorch, which number the blocks of all stages through.
_NUMBERED = {"_conv_stem": "stem/conv", "_bn0": "stem/norm", "_conv_head": "top/conv", "_bn1": "top/norm", "_fc": "head"}
_NUMBERED_BLOCK = {
    "_expand_conv": "expand",
    "_bn0": "expand_norm",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise_norm",
    "_se_reduce": "se/reduce",
    "_se_expand": "se/excite",
    "_project_conv": "project",
    "_bn2": "project_norm",
}

_KERNEL_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}  # theirs in our order
_LEAVES = {"running_mean": "mean", "running_var": "var"}
_ALONE = {"cls_token": "token", "pos_embed": "positions"}
_UNUSED = "num_batches_tracked"  # counts for an average that the running statistics are not


def twin(timm_name: str, *, num_classes: int, **kwargs: Any) -> nn.Module:
    """The model here that computes what timm's model of that name computes.

    Args:
      timm_name: a key of `TWINS`; what follows a dot, the tag of trained weights, does not matter.
      num_classes: the number of logits.
      **kwargs: the model's other settings.

    Raises:
      ValueError: there is none.
    """
    check_name(timm_name)
    name, settings = TWINS[timm_name.split(".")[0]]
    return models.build(name, num_classes=num_classes, **{**settings, **kwargs})


def check_name(timm_name: str) -> None:
    """Raises ValueError if no model here computes what timm's of that name does."""
    architecture = timm_name.split(".")[0]
    if architecture not in TWINS:
        raise ValueError(f"no model here corresponds to timm's {architecture!r}{did_you_mean(architecture, TWINS)}")


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Parts of names with tags whose weights are for other pixels than their family's.
_OF_TAGS = {
    ".ap_in1k": _HALF,
    ".ra4_e3600": _HALF,
    ".dino": _IMAGENET,
    ".mae": _IMAGENET,
    "vit_base_patch16_224.bamboo": _CLIP,
}


def pixels(timm_name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels, scaled to [0, 1], that the weights of timm's model are for.

    Args:
      timm_name: with the tag of the trained weights after a dot, or without it for timm's default.

    Raises:
      ValueError: no model here corresponds to it.
    """
    check_name(timm_name)
    known = next((values for part, values in _OF_TAGS.items() if part in timm_name), None)
    if known is not None:
        return known
    halves = timm_name.startswith(("vit_", "tf_efficientnet_lite")) or timm_name in ("tf_efficientnet_b8", "efficientnet_b1")
    return _HALF if halves else _IMAGENET


def from_timm(state: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a timm model as variables of its twin.

    Args:
      state: timm's `state_dict`, its tensors as numpy arrays; of an EfficientNet also that of the package efficientnet_pytorch,
        and of those that name their tensors as it does.
      like: the twin's variables, or their shapes as `jax.eval_shape` gives them.

    Returns:
      Variables with the paths, shapes and dtypes of `like`, numpy arrays.

    Raises:
      ValueError: an array has no place, a place has no array, sizes differ, or values are not finite; all of them are named.
    """
    return fitted(placed(state, like), like)


def placed(state: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same by path, whether or not the model has all of them; in the model's shapes where those split axes or join them.

    Raises:
      ValueError: two arrays have one place.
    """
    shapes = named_leaves(like)
    values: dict[str, np.ndarray] = {}
    owners: dict[str, str] = {}
    twice = []
    places = _numbered_places(shapes) if "_conv_stem.weight" in state else functools.partial(_places, state)
    for name, value in state.items():
        for path, part in places(name, np.asarray(value)):
            if owners.setdefault(path, name) != name:
                twice.append(f"{one_line(owners[path])} and {one_line(name)} are both {one_line(path)}")
            shape = tuple(shapes[path].shape) if path in shapes else part.shape
            values[path] = part.reshape(shape) if _splits(part.shape, shape) else part
    if twice:
        raise ValueError("the names are not those of a model in timm:\n  " + "\n  ".join(twice))
    return values


def _splits(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one shape has axes of the other split, or joined: attention here has an axis of heads."""
    first, second = (set(itertools.accumulate(shape, operator.mul, initial=1)) for shape in (one, other))
    return math.prod(one) == math.prod(other) and (first <= second or second <= first)


def _numbered_places(shapes: Mapping[str, Any]) -> Callable[[str, np.ndarray], list[tuple[str, np.ndarray]]]:
    """`_places` of a file whose blocks are numbered through, for a model with these paths."""
    matches = (re.match(r"params/stage(\d{1,6})/block(\d{1,6})/", path) for path in shapes)
    blocks = sorted({(int(match[1]), int(match[2])) for match in matches if match})

    def places(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
        if name.endswith(_UNUSED):
            return []
        layer, _, leaf = name.rpartition(".")
        match = re.match(r"_blocks\.(\d{1,6})\.", name)
        if not match:
            return [_place(_NUMBERED.get(layer, layer), leaf, value)]
        number, inner = int(match[1]), layer[match.end() :]
        where = "stage{}/block{}".format(*blocks[number]) if number < len(blocks) else f"block {number}"
        return [_place(f"{where}/{_NUMBERED_BLOCK.get(inner, inner)}", leaf, value)]

    return places


def _places(state: Mapping[str, np.ndarray], name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Where an array belongs, and with which order of elements; one that holds queries, keys and values is three."""
    if name.endswith(_UNUSED):
        return []
    if name in _ALONE:
        return [(f"params/{_ALONE[name]}", value)]
    path, block, layer, leaf = _split(name)
    if layer == "attn.qkv" and value.ndim and value.shape[0] % 3 == 0:
        parts = zip(("query", "key", "value"), np.split(value, 3), strict=True)
        return [_place(f"{path}attention/{part}", leaf, piece) for part, piece in parts]
    return [_place(path + _layers(state, block).get(layer, layer), leaf, value)]


def _layers(state: Mapping[str, np.ndarray], block: str) -> dict[str, str]:
    """The names, there and here, of the layers of a block; of those outside of blocks for ""."""
    if "conv_stem.weight" in state:
        expands = f"{block}.conv_pwl.weight" in state
        return (_MBCONV if expands else _MBCONV_UNEXPANDED) if block else _EFFICIENTNET
    if "patch_embed.proj.weight" in state:
        return _VIT_BLOCK if block else _VIT
    return _RESNET_BLOCK if block else _RESNET


def _split(name: str) -> tuple[str, str, str, str]:
    """The path here of the block that an array belongs to, that block there, the layer in it, and the array in the layer."""
    layer, _, leaf = name.rpartition(".")
    for pattern, path in _REPEATED:
        if match := re.match(pattern, name):
            return path(*map(int, match.groups())), match[0][:-1], layer[match.end() :], leaf
    return "", "", layer, leaf


def _place(layer: str, leaf: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Kernels have their output axis first there and last here, behind window and input."""
    if leaf in _LEAVES:
        return f"batch_stats/{layer}/{_LEAVES[leaf]}", value
    if leaf != "weight":
        return f"params/{layer}/{leaf}", value
    if value.ndim == 1:
        return f"params/{layer}/scale", value
    axes = _KERNEL_AXES.get(value.ndim)
    return f"params/{layer}/kernel", value if axes is None else value.transpose(axes)
