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
from lowrank_jax.planning.arguments import array_problem, check_key
from lowrank_jax.text import did_you_mean, first_line, one_line, shown

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
      TypeError: the model is not a Linen module, or another argument is not of its type.
      ValueError: the file is damaged or of another kind, or does not fit the model: whatever is missing, left over, of another
        shape or not finite is named.  Or the model cannot be initialised on the images.
      OSError: it cannot be read.
      ImportError: the package safetensors is not installed, and the file needs it.
    """
    check_model(model)
    path = _path(source)
    if redraw is not None and not isinstance(redraw, str):
        raise TypeError(f"redraw must be a pattern of paths, not {shown(redraw)}")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32) if images is None else images
    if redraw is not None and key is None:
        raise ValueError("redraw needs key=, a key of jax.random")
    if (problem := array_problem(images)) is not None:
        raise TypeError(f"images: {problem}")
    if key is not None:
        check_key(key)
    drawn_by = jax.random.key(0) if key is None else key

    def init(images: Any) -> Any:
        return nn.meta.unbox(model.init(drawn_by, images))

    given = arrays(path, names)
    try:
        shapes = jax.eval_shape(init, images)
    except Exception as error:  # whatever somebody's model may raise
        raise ValueError(f"the model cannot be initialised on images {list(images.shape)}: {first_line(error)}") from error

    def draw() -> Any:
        return jax.jit(init)(jnp.zeros(images.shape, images.dtype))

    return fitted(given, shapes, redraw=redraw, draw=draw)


def _path(source: Any) -> str:
    path = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(path, str):
        raise TypeError(f"source must be the name of a file, not {shown(source)}")
    return path


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
    return _renamed(state, names)


def _renamed(state: Arrays, names: Names) -> Arrays:
    if not isinstance(names, Mapping) and not callable(names):
        raise TypeError(f"names must be a dict, or a function, from names in the file to paths, not {shown(names)}")
    places = {name: names.get(name, name) if isinstance(names, Mapping) else names(name) for name in state}
    unknown = [name for name in names if name not in state] if isinstance(names, Mapping) else []
    problems = [f"{shown(name)} is no name in the file{did_you_mean(str(name), state)}" for name in unknown]
    owners: dict[str, str] = {}
    for name, place in places.items():
        if not isinstance(place, str):
            problems.append(f"{shown(name)} becomes {shown(place)}, which is no path")
        elif owners.setdefault(place, name) != name:
            problems.append(f"{shown(owners[place])} and {shown(name)} both become {shown(place)}")
    if problems:
        raise ValueError("names:\n  " + "\n  ".join(problems))
    return {place: state[name] for place, name in owners.items()}


def _of_file(path: str) -> dict[str, np.ndarray]:
    if not path.endswith(SAFETENSORS):
        return pickled.read(path)
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(f"{first_line(error)}; files of safetensors need it: pip install 'lowrank_jax[weights]'") from None
    place = pathlib.Path(path)
    if place.exists() and not place.is_file():
        raise ValueError(f"{path} is {'a folder' if place.is_dir() else 'no regular file'}")
    with place.open("rb"):  # its own error where it cannot be read
        pass
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        reason = one_line(first_line(error))
        raise ValueError(f"{path} is no file of safetensors, or it is damaged: {reason}") from None
