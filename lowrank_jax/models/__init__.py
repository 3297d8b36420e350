"""Models by name: plain Linen modules that know nothing of low rank."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from lowrank_jax.models.efficientnet import EFFICIENTNETS, EfficientNet
from lowrank_jax.models.mlp import MLP
from lowrank_jax.models.resnet import RESNETS, ResNet
from lowrank_jax.models.vit import VITS, ViT
from lowrank_jax.models.wide_resnet import WIDE_RESNETS, WideResNet
from lowrank_jax.named_code import import_attribute
from lowrank_jax.text import did_you_mean

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    **{
        name: functools.partial(family, **settings)
        for family, members in ((ResNet, RESNETS), (WideResNet, WIDE_RESNETS), (EfficientNet, EFFICIENTNETS), (ViT, VITS))
        for name, settings in members.items()
    },
}


def build(name: str, *, num_classes: int, **kwargs: Any) -> nn.Module:
    """The model of that name, not initialised.

    Args:
      name: a key of `MODELS`, or "package.module:attribute" for a constructor elsewhere.  Models are called as
        `model(images, train=bool)` on images `[batch, height, width, channels]` and return logits `[batch, num_classes]`.
      num_classes: the number of logits.
      **kwargs: the model's own settings.

    Raises:
      ValueError: no such model.
      TypeError: what it names makes something else.
    """
    return make(name, {"num_classes": num_classes, **kwargs})


def make(name: str, settings: Mapping[str, Any], folder: str | None = None) -> nn.Module:
    """The same with all settings in one mapping, for models that call the number of outputs something else.

    Args:
      name, settings: as for `build`.
      folder: where code is looked up besides the installed packages.
    """
    model = constructor(name, folder)(**settings)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} makes {type(model).__name__}, not a Linen module")
    return model


def constructor(name: str, folder: str | None = None) -> Callable[..., Any]:
    """What `build` will call.

    Args:
      name: as for `build`.
      folder: where code is looked up besides the installed packages.

    Raises:
      ValueError: no such model.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise ValueError(f"unknown model {name!r}{did_you_mean(name, MODELS)}")
    found = import_attribute(name, "model", folder)
    if not callable(found):
        raise ValueError(f"model {name!r} is {found!r}; it must be a Linen module class, or a function that makes one")
    return found


def settings(name: str, folder: str | None = None) -> dict[str, Any] | None:
    """The settings of a model and their types, for checking; None where they are not known, as of a function."""
    cls: Any = constructor(name, folder)
    cls = cls.func if isinstance(cls, functools.partial) else cls
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and dataclasses.is_dataclass(cls)):  # nn.Module is none
        return None
    hidden = {"parent", "name"}
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # names that are there for type checkers alone
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(cls) if field.name not in hidden}
