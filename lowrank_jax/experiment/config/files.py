"""Config files: loads one, overrides keys by dotted name, and turns a config back into plain values."""

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import os
import pathlib
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.duration import Duration
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.text import did_you_mean, first_line, shown

Overrides = Mapping[str, Any] | Sequence[tuple[str, Any]]
"""Values by dotted key, as text or such that their `str` is a Python literal."""


class ConfigError(UserError):
    """A config or a command line is not valid; `problems` has an entry for each problem."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


class _Settings(ConfigDict):
    """A `ConfigDict` that holds what it is given: the original turns True into 1.0 where there was a 0.1."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str):
            raise TypeError(f"{shown(key)} is no key; keys are text")
        if isinstance(value, bool) and key in self:
            super().__setitem__(key, None)  # which may become anything
        super().__setitem__(key, value)


def default() -> Any:
    """A `ConfigDict` of every key with its default, for a config file to change. `parse` checks the types."""
    return _settings(to_dict(Config()))


def _settings(values: dict[str, Any]) -> _Settings:
    settings = _Settings(type_safe=False)
    for key, value in values.items():
        settings[key] = _settings(value) if isinstance(value, dict) else value
    return settings


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
    name, argument = _file_and_argument(path)
    file = pathlib.Path(name)
    if not name or file.is_dir():
        raise ConfigError(path or "config", ["it is a folder; name a Python file" if name else "no file is named"])
    if not file.is_file():
        known = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        problem = "it is no regular file" if file.exists() else f"there is no such file{did_you_mean(name, known)}"
        raise ConfigError(path, [problem])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(path, ["it is not a Python file"])
    module = importlib.util.module_from_spec(spec)
    try:
        with _folder_kept():
            spec.loader.exec_module(module)
            if argument and not inspect.signature(module.get_config).parameters:
                raise ConfigError(path, [f"{name} takes no argument; remove :{argument}"])
            config = module.get_config(argument) if argument else module.get_config()
    except ConfigError as error:  # of a config that this one changes
        raise ConfigError(path, error.problems) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's file may raise, SystemExit too
        raise ConfigError(path, [f"it fails with {type(error).__name__}: {first_line(error)}"]) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(path, [f"get_config() must return a ConfigDict, not {type(config).__name__}"])
    return config


def _file_and_argument(path: str) -> tuple[str, str]:
    """The parts of "file.py:argument"; a folder's name may have a colon too."""
    if pathlib.Path(path).is_file():
        return path, ""
    name, suffix, argument = path.rpartition(".py:")
    if suffix:
        return f"{name}.py", argument
    name, _, argument = path.partition(":")
    return name, argument


@contextlib.contextmanager
def _folder_kept() -> Iterator[None]:
    """Whatever a config file does to the current folder, the paths of the command line mean what they meant."""
    try:
        folder = pathlib.Path.cwd()
    except FileNotFoundError:
        raise ConfigError("lowrank", ["the current folder has been deleted; cd to another"]) from None
    try:
        yield
    finally:
        os.chdir(folder)


def overridden(config: str | ConfigDict, overrides: Overrides = ()) -> ConfigDict:
    """The values of a config file, or a copy of values at hand, with some of them replaced by dotted key."""
    loaded, source = (load(config), config) if isinstance(config, str) else (config, "config")
    pairs = list(overrides if isinstance(overrides, Sequence) else overrides.items())
    given = _resolved(loaded, dict(pairs), source)
    for key, value in pairs:
        override(given, key, str(value))
    return given


def _resolved(config: ConfigDict, overrides: Mapping[str, Any], source: str) -> ConfigDict:
    """A copy without references and placeholders.  Raises ConfigError for required values that nobody gives."""
    try:
        unset = list(_unset(config, set()))
    except TypeError:  # it sorts its keys
        raise ConfigError(source, ["a key is not text"]) from None
    if missing := [key for key in unset if key not in overrides]:
        raise ConfigError(source, [f"{key}: required, but not set; give it by --config.{key}=..." for key in missing])
    if unset:
        config = copy.deepcopy(config)
        for key in unset:
            override(config, key, str(overrides[key]))
    return config.copy_and_resolve_references()


def _unset(config: ConfigDict, seen: set[int], prefix: str = "") -> Iterator[str]:
    """The keys of placeholders that are required and empty; `seen` are sections that were looked into."""
    seen.add(id(config))
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from _unset(value, seen, f"{prefix}{key}.") if id(value) not in seen else ()
        elif isinstance(value, FieldReference):
            try:
                value.get()
            except RequiredValueError:
                yield f"{prefix}{key}"


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets a dotted key to a value given as text, read by the type of the key. `parse` checks both later."""
    *sections, last = parts = key.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ConfigError("config", [f"{shown(key)}: no key; keys look like optim.lr, and a value follows an equals sign"])
    hint = type_of(key)
    # Where the model decides, "none" may be one of its words, such as the norm of a ResNet; None is Python's.
    keep_text = hint is str or hint is Duration or (hint is None and text == "none")
    with config.unlocked():
        node: Any = config
        for section in sections:
            if not isinstance(node.get(section), ConfigDict):
                node[section] = ConfigDict(type_safe=False)
            node = node[section]
        node[last] = None  # a ConfigDict turns True into 1.0 where there was a 0.1
        try:
            node[last] = _unquoted(text) if keep_text else _literal(text)
        except (TypeError, ValueError) as error:  # a mapping whose keys are numbers, or have dots in them
            raise ConfigError("config", [f"{key}: {shown(text)}; {first_line(error)}"]) from None


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        with warnings.catch_warnings(action="ignore"):  # of text that looks odd as Python, and need not be
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
