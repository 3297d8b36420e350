"""Refuses models that are not Linen modules, and variables that are none, before any work."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from lowrank_jax.text import shown


def check_model(model: Any) -> None:
    """Refuses what is not an instance of `flax.linen.Module`, and says what to pass instead.

    Raises:
      TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lowrank_jax takes a flax.linen module; {_found(model)}")


def check_variables(variables: Any, name: str = "variables") -> None:
    """Raises TypeError for what is no dict of collections, and ValueError for one without parameters; `name` is its own."""
    if not isinstance(variables, Mapping):
        raise TypeError(f"{name} must be a dict of collections, as model.init returns it, not {shown(variables)}")
    if "params" not in variables:
        keys = ", ".join(map(str, variables)) or "nothing"
        raise ValueError(f'{name} must have "params", as for model.apply, and have {keys}')


def _found(model: Any) -> str:
    cls = model if isinstance(model, type) else type(model)
    if any(f"{base.__module__}.".startswith("flax.nnx.") for base in cls.__mro__):
        return f"{cls.__name__} is one of flax.nnx, and flax.nnx modules are not taken yet"
    if isinstance(model, type):
        of_linen = issubclass(model, nn.Module)
        return (
            f"{cls.__name__} is a class: pass an instance, {cls.__name__}(...)" if of_linen else f"not the class {cls.__name__}"
        )
    if isinstance(getattr(model, "module", None), nn.Module):
        return f"this {cls.__name__} has it inside: pass model.module"
    return f"not {cls.__name__}"
