"""Trained weights in files, as a model's variables: those of timm, and safetensors."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.exchange import pickled, timm
from lowrank_jax.exchange.fit import Arrays, fitted
from lowrank_jax.linen.model_check import check_model
from lowrank_jax.planning.arguments import check_key
from lowrank_jax.text import first_line, shown

TIMM, SAFETENSORS = "timm:", ".safetensors"

Names = Mapping[str, str] | Callable[[str], str]


def load(
    source: str | os.PathLike[str],
    model: nn.Module,
    *,
    images: Any = None,
    names: Names | None = None,
    redraw: str | None = None,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Trained weights of a file as a model's variables.

        model = lr.models.build("efficientnet_lite0", num_classes=1000)
        variables = lr.load("timm:tf_efficientnet_lite0=efficientnet_lite0.pth", model)

    Args:
      source: "timm:NAME=FILE", a .pth or .safetensors file with the tensors of timm's model of that name; or a .safetensors
        file whose names are the paths of the variables, such as "params/head/kernel".
      model: a Linen module.
      images: what it is initialised on, an array or its shape as a `jax.ShapeDtypeStruct`; by default `[1, 224, 224, 3]`.
      names: from the names in a .safetensors file to paths here, for those that differ.
      redraw: a pattern of paths that are not taken from the file but drawn by the model's own initialiser, as for another
        number of classes.
      key: for those.

    Returns:
      `params`, `batch_stats` and the model's other collections, NumPy's arrays in the model's own dtypes.

    Raises:
      TypeError: the model is not a Linen module, or the key is none.
      ValueError: the file is damaged or of another kind, or does not fit the model: whatever is missing, left over, of another
        shape or not finite is named.
      OSError: it cannot be read.
    """
    check_model(model)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32) if images is None else images
    if redraw is not None and key is None:
        raise ValueError("redraw needs key=, a key of jax.random")
    if key is not None:
        check_key(key)
    drawn_by = jax.random.key(0) if key is None else key

    def init(images: Any) -> Any:
        return nn.meta.unbox(model.init(drawn_by, images))

    given = arrays(os.fspath(source), names)

    def draw() -> Any:
        return jax.jit(init)(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), images))

    return fitted(given, jax.eval_shape(init, images), redraw=redraw, draw=draw)


def arrays(source: str, names: Names | None = None) -> Arrays | Callable[[Any], Arrays]:
    """The arrays of a file by path; of timm's a function that finds their places among a model's shapes.

    Raises:
      ValueError, OSError: as for `load`.
    """
    if source.startswith(TIMM):
        if names is not None:
            raise ValueError("names are for .safetensors files of other models; timm's are known")
        name, equals, path = source.removeprefix(TIMM).partition("=")
        if not (name and equals and path):
            raise ValueError(f"{shown(source)} must be timm:NAME=FILE")
        timm.check_name(name)
        state = _of_file(path)
        return lambda shapes: timm.placed(state, shapes)
    if not source.endswith(SAFETENSORS):
        hint = " (timm:NAME=FILE)" if source.endswith(pickled.SUFFIXES) else ""
        raise ValueError(f"{shown(source)} must be timm:NAME=FILE, or a .safetensors file{hint}")
    state = _of_file(source)
    if names is None:
        return state
    renamed = {}
    for name, value in state.items():
        place = names(name) if callable(names) else names.get(name, name)
        if not isinstance(place, str) or place in renamed:
            raise ValueError(f"names: {shown(name)} becomes {shown(place)}, which is no name or another array's")
        renamed[place] = value
    return renamed


def _of_file(path: str) -> dict[str, np.ndarray]:
    if not path.endswith(SAFETENSORS):
        return pickled.read(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not pathlib.Path(path).is_file():
        raise ValueError(f"{path} is no file")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of safetensors, or it is damaged: {first_line(error)}") from None
