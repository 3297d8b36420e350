"""Config files: loads one, overrides keys by dotted name, and turns a config back into plain values."""

import ast
import dataclasses
import importlib.util
import inspect
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.duration import Duration
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.text import did_you_mean

Overrides = Mapping[str, Any] | Sequence[tuple[str, Any]]
"""Values by dotted key, as text or such that their `str` is a Python literal."""


class ConfigError(UserError):
    """A config or a command line is not valid; `problems` has an entry for each problem."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


def default() -> Any:
    """A `ConfigDict` of every key with its default, for a config file to change. `parse` checks the types."""
    return ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(config: Any) -> dict[str, Any]:
    """A parsed config as plain values, which JSON can hold and `parse` can read."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value


def load(path: str) -> Any:
    """Runs `get_config()` of a config file; "file.py:argument" calls it with the argument.

    Raises:
      ConfigError: the file does not exist, or raises an exception.
    """
    name, _, argument = path.partition(":")
    file = pathlib.Path(name)
    if not file.is_file():
        known = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ConfigError(path, [f"there is no such file{did_you_mean(name, known)}"])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(path, ["it is not a Python file"])
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if argument and not inspect.signature(module.get_config).parameters:
            raise ConfigError(path, [f"{name} takes no argument; remove :{argument}"])
        config = module.get_config(argument) if argument else module.get_config()
    except ConfigError as error:  # of a config that this one changes
        raise ConfigError(path, error.problems) from error
    except (Exception, SystemExit) as error:  # whatever somebody's file may raise
        raise ConfigError(path, [f"it fails with {type(error).__name__}: {error}"]) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(path, [f"get_config() must return a ConfigDict, not {type(config).__name__}"])
    return config


def overridden(config: str | ConfigDict, overrides: Overrides = ()) -> ConfigDict:
    """The values of a config file, or a copy of values at hand, with some of them replaced by dotted key."""
    given = load(config) if isinstance(config, str) else config.copy_and_resolve_references()
    for key, value in overrides if isinstance(overrides, Sequence) else overrides.items():
        override(given, key, str(value))
    return given


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets a dotted key to a value given as text, read by the type of the key. `parse` checks both later."""
    *sections, last = key.split(".")
    hint = type_of(key)
    # Where the model decides, "none" may be one of its words, such as the norm of a ResNet; None is Python's.
    keep_text = hint is str or hint is Duration or (hint is None and text == "none")
    with config.unlocked():
        node: Any = config
        for section in sections:
            if not isinstance(node.get(section), ConfigDict):
                node[section] = ConfigDict(type_safe=False)
            node = node[section]
        node[last] = _unquoted(text) if keep_text else _literal(text)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def type_of(key: str) -> Any:
    """The type of a dotted key; None if there is no such key, or the model decides."""
    cls: Any = Config
    for part in key.split("."):
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if part not in hints:
            return None
        cls = hints[part]
    return cls


def legal_keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key that a config may set."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(hint) and hint is not Duration
        keys += legal_keys(hint, f"{prefix}{name}.") if nested else [prefix + name]
    return keys
