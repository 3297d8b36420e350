"""Checks values against the types of a dataclass's fields."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from lowrank_jax.experiment.config.files import legal_keys, legal_sections, type_of
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.duration import Duration
from lowrank_jax.experiment.frozen import FrozenDict
from lowrank_jax.text import did_you_mean, shown


def read_section(cls: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """A dataclass from a mapping; an invalid field keeps its default, and its problem is added."""
    hints, read = typing.get_type_hints(cls), {}
    for key in values:
        if key not in hints:
            problems.append(f"{prefix}{key}: unknown key{did_you_mean(f'{prefix}{key}', _known(cls, prefix))}")
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        name, value, hint = prefix + field.name, values[field.name], hints[field.name]
        if dataclasses.is_dataclass(hint) and hint is not Duration:
            if isinstance(value, dict):
                read[field.name] = read_section(hint, value, name + ".", problems)
            else:
                first = dataclasses.fields(hint)[0].name
                problems.append(f"{name}: {shown(value)}; must be a section with keys, such as {name}.{first}")
            continue
        try:
            value = read_value(value, hint)
        except ValueError as error:
            problems.append(f"{name}: {shown(value)}; must be {error}")
            continue
        check = field.metadata.get("check")
        complaint = check(value) if check and value is not None else None
        if complaint:
            problems.append(f"{name}: {value if isinstance(value, Duration) else shown(value)}; {complaint}")
        else:
            read[field.name] = value
    return cls(**read)


def _known(cls: Any, prefix: str) -> list[str]:
    """Keys to suggest for an unknown one."""
    ours = cls is Config or type_of(prefix[:-1]) is cls
    return [*legal_keys(), *legal_sections()] if ours else legal_keys(cls, prefix)


_MAPPING = "a mapping"
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
_KINDS |= {dict: _MAPPING, FrozenDict: _MAPPING}


def read_value(value: Any, hint: Any) -> Any:
    """The value as the hinted type.

    Raises:
      ValueError: it does not have that type; the message names the type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _read_any(value, [arg for arg in args if arg is not type(None)])
    if origin is typing.Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise ValueError("one of " + ", ".join(map(repr, args)))
        return value
    if hint is Duration:
        return value if isinstance(value, Duration) else Duration.read(value)
    if origin is not None and issubclass(origin, Sequence):
        return _typed_tuple(value, args)
    if hint in (dict, FrozenDict) and isinstance(value, dict | ConfigDict):
        return _frozen(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(_of_64_bits(value) if isinstance(value, int) else value)
    if hint is int and type(value) is int:
        return _of_64_bits(value)
    if hint is str and type(value) is str:
        return _text(value)
    if hint is bool and type(value) is bool:
        return value
    if hint is Any:
        return value
    if hint not in _KINDS:  # some other model's own type, which only it can judge
        return value
    raise ValueError(_KINDS[hint])


def _read_any(value: Any, hints: Sequence[Any]) -> Any:
    """The value as one of several types."""
    expected = []
    for hint in hints:
        try:
            return read_value(value, hint)
        except ValueError as error:
            expected.append(str(error))
    raise ValueError(", or ".join(dict.fromkeys(expected)))


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("finite")
    return number


def _of_64_bits(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("a whole number of at most 64 bits")
    return value


_LONGEST = 4096
"""Characters of a text: as many as a path may have."""


def _text(value: str) -> str:
    if len(value) > _LONGEST:
        raise ValueError(f"text of at most {_LONGEST} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("text that UTF-8 can write") from None
    return value


_DEPTH = 20
"""So deep may values be nested."""


def _frozen(value: Any, depth: int = 0) -> Any:
    """Plain values, which config.json can hold: mappings as `FrozenDict`, sequences as tuples."""
    if depth > _DEPTH:
        raise ValueError(f"{_MAPPING} of values at most {_DEPTH} deep")
    if isinstance(value, dict | ConfigDict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{_MAPPING} whose keys are text, not {shown(wrong[0])}")
        return FrozenDict({key: _frozen(item, depth + 1) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item, depth + 1) for item in value)
    if value is None or type(value) is bool:
        return value
    if type(value) not in _PLAIN:
        raise ValueError(f"{_MAPPING} of plain values, not of {type(value).__name__}")
    try:
        return _PLAIN[type(value)](value)
    except ValueError as error:
        raise ValueError(f"{_MAPPING} of plain values: {shown(value)} must be {error}") from None


_PLAIN: dict[type, Callable[[Any], Any]] = {int: _of_64_bits, float: _finite, str: _text}


def _typed_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("a sequence, such as (1, 2)")
    if len(args) == 1 or args[1:] == (Ellipsis,):  # Sequence[int], or tuple[int, ...]
        return tuple(read_value(item, args[0]) for item in value)
    if len(value) != len(args):
        raise ValueError(f"a sequence of {len(args)}")
    return tuple(read_value(item, arg) for item, arg in zip(value, args, strict=True))
