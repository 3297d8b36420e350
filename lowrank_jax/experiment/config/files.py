"""Config files: loads one, overrides keys by dotted name, and turns a config back into plain values."""

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import pathlib
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict
from ml_collections.config_dict import RequiredValueError

from lowrank_jax.experiment import shipped
from lowrank_jax.experiment.config.code import code_names
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.duration import Duration
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.named_code import folder_kept, folder_of
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
        section = dict(self.items(preserve_field_references=True)).get(key)  # a placeholder has no value
        if isinstance(section, _Section) and isinstance(value, dict | FrozenConfigDict):
            for name, inner in value.items():
                section[name] = inner
            return
        if isinstance(section, _Section) and isinstance(value, ConfigDict):
            _complete(value, section)  # and not the other way round: whoever made it may go on to change it
        if isinstance(value, bool) and key in self:
            super().__setitem__(key, None)  # which may become anything
        super().__setitem__(key, value)


class _Section(_Settings):
    """Keys that the schema knows: a mapping in its place sets what is in it, as `override` does, and leaves the rest."""


def _complete(given: ConfigDict, section: ConfigDict) -> None:
    """Adds what a section has besides."""
    with given.unlocked():
        for key, value in section.items(preserve_field_references=True):
            if key not in given:
                given[key] = value


def default() -> Any:
    """A `ConfigDict` of every key with its default, for a config file to change. `parse` checks the types.

    A mapping that is assigned to a section sets what is in it, and leaves the section's other values as they are.
    """
    return _settings(to_dict(Config()), _Settings)


def _settings(values: dict[str, Any], kind: type[_Settings]) -> _Settings:
    """Plain values as they are assigned; what is no section holds the keys of somebody's own code."""
    settings = kind(type_safe=False)
    for key, value in values.items():
        inner = _Section if kind is _Settings and dataclasses.is_dataclass(type_of(key)) else _Settings
        settings[key] = _settings(value, inner) if isinstance(value, dict) else value
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

    Args:
      path: of the file; or the name of a config that comes with the package, such as "digits_resnet".

    Raises:
      ConfigError: the file does not exist, or raises an exception.
    """
    name, argument = _file_and_argument(path)
    file = locate(name)
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
    if inspect.iscoroutine(config):
        config.close()  # or Python complains that nobody waited for it
    if not isinstance(config, ConfigDict):
        raise ConfigError(path, [f"get_config() must return a ConfigDict, not {type(config).__name__}"])
    return config


def locate(name: str) -> pathlib.Path:
    """The file of a config, which is given by its path or, where it comes with the package, by its name.

    Raises:
      ConfigError: there is no such file, or it is none.
    """
    file = shipped.path(name) if shipped.is_name(name) else pathlib.Path(name)
    if file.is_file():
        return file
    given = pathlib.Path(name)
    if not name or given.is_dir():
        problem = "it is a folder; name a Python file, or a config that lowrank configs lists" if name else "no file is named"
    elif given.exists():
        problem = "it is not a Python file" if given.is_file() else "it is no regular file"
    else:
        problem = f"there is no such {'config' if shipped.is_name(name) else 'file'}{_similar(name)}"
    raise ConfigError(name or "config", [problem])


def _similar(name: str) -> str:
    """The file, or the config that comes with the package, that may have been meant."""
    folder, stem = pathlib.Path(name).parent, pathlib.Path(name).stem
    files = {str(file): file.stem for file in sorted(folder.glob("*.py"))} if folder.is_dir() else {}
    named = files | {other: other for other in shipped.names()}
    if same := next((known for known, other in named.items() if other == stem), None):
        return f"; did you mean {same}?"
    return did_you_mean(name, shipped.names() if shipped.is_name(name) else named)


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
    """`folder_kept`, whose error says what to do."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder_kept())
        except FileNotFoundError:
            raise ConfigError("lowrank", ["the current folder has been deleted; cd to another"]) from None
        yield


def overridden(config: str | ConfigDict, overrides: Overrides = ()) -> ConfigDict:
    """The values of a config file, or a copy of values at hand, with some of them replaced by dotted key.

    `code_dir` is set if they name code that only the file's own folder, or the current one, has.
    """
    loaded, source = (load(config), config) if isinstance(config, str) else (config, "config")
    pairs = list(overrides if isinstance(overrides, Sequence) else overrides.items())
    given = _resolved(loaded, dict(pairs), source)
    for key, value in pairs:
        override(given, key, str(value))
    folders = [pathlib.Path(config.partition(":")[0]).parent] if isinstance(config, str) else []
    _set_code_dir(given, [*folders, pathlib.Path()])
    return given


def _set_code_dir(config: ConfigDict, folders: Sequence[pathlib.Path]) -> None:
    """Sets where code is looked up, if nobody has and the config names code that is not found without."""
    try:
        values = config.to_dict()
    except TypeError:  # a key is not text, which `parse` says
        return
    if values.get("code_dir") is not None:
        return
    named = [name for names in code_names(values).values() for name in names]
    if (folder := folder_of(named, folders)) is not None:
        with config.unlocked():
            config.code_dir = folder


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
    """Sets a dotted key to a value given as text, read by the type of the key. `parse` checks both later.

    A mapping for a section sets what is in it, and leaves the section's other values as they are.
    """
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
        value = _unquoted(text) if keep_text else _literal(text)
        if isinstance(value, dict) and dataclasses.is_dataclass(hint) and all(isinstance(name, str) for name in value):
            for name, inner in value.items():
                override(config, f"{key}.{name}", repr(inner))
            return
        node[last] = None  # a ConfigDict turns True into 1.0 where there was a 0.1
        try:
            node[last] = value
        except (TypeError, ValueError) as error:  # a mapping whose keys are numbers, or have dots in them
            raise ConfigError("config", [f"{key}: {shown(text)}; {first_line(error)}"]) from None


def keys_given(overrides: Overrides) -> list[str]:
    """The dotted keys that overrides set, those within the mapping for a section one by one."""
    pairs = overrides if isinstance(overrides, Sequence) else overrides.items()
    return [given for key, value in pairs for given in _keys_within(key, str(value))]


def _keys_within(key: str, text: str) -> list[str]:
    value = _literal(text)
    if not (isinstance(value, dict) and dataclasses.is_dataclass(type_of(key))):
        return [key]
    return [given for name, inner in value.items() for given in _keys_within(f"{key}.{name}", repr(inner))]


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


def legal_sections() -> list[str]:
    """Every dotted name of keys that belong together, such as "optim"."""
    sections = (section for key in legal_keys() for section in (key.rpartition(".")[0], key.partition(".")[0]))
    return [section for section in dict.fromkeys(sections) if section and dataclasses.is_dataclass(type_of(section))]
