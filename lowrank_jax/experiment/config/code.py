"""Which code the values of a config name."""

from collections.abc import Mapping
from typing import Any

from lowrank_jax.experiment.data import datasets

_KEYS = (("model", "name"), ("objective", "name"), ("objective", "loss"), ("objective", "metrics"), ("dataset", "name"))


def code_names(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of code in a config, by dotted key.  Its values need not be valid."""
    found = {}
    for section, key in _KEYS:
        part = values.get(section)
        value = part.get(key) if isinstance(part, Mapping) else None
        names = value if isinstance(value, list | tuple) else [value]
        code = [name for name in names if isinstance(name, str) and ":" in name]
        found[f"{section}.{key}"] = [name for name in code if section != "dataset" or datasets.is_code(name)]
    return found
