"""What the records of a run must hold, checked completely, so that whatever compares runs can rely on it."""

import functools
import reprlib
from collections.abc import Iterable, Mapping, Set
from typing import Any

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.files import type_of
from lowrank_jax.experiment.config.typed import read_value
from lowrank_jax.experiment.workdir.files import is_count
from lowrank_jax.experiment.workdir.identity import defaults, flatten

_LARGEST = 2**127  # about what float32 holds; sums of squares of that do not overflow
_DEEPEST = 50
_ONE = 1 + 1e-6  # as a mean that is rounded


COUNT_ALL = ("loss", "top1", "top5")
"""What counts every example; others may count nobody, and are no number then."""


class NotMeasured(ValueError):
    """The run has not measured the metric that it is to be compared by."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting, by dotted key, is not of its type."""
    types = _types()
    for key in _required() - settings.keys():
        raise _wrong(key, {}, _expected({}, types[key]))
    for key, value in settings.items():
        _check_finite(key, value)
        known = next((name for name in _with_parents(key) if name in types), None)
        if known is not None and (complaint := _expected(value if known == key else {}, types[known])):
            raise _wrong(known, value, complaint)


@functools.cache
def _types() -> dict[str, Any]:
    return {key: type_of(key) for key in configs.legal_keys()}


@functools.cache
def _required() -> Set[str]:
    return flatten(defaults()).keys()


def _with_parents(key: str) -> Iterable[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _expected(value: Any, hint: Any) -> str:
    """What a value of the hinted type is; empty if this is one."""
    try:
        read_value(value, hint)
    except ValueError as error:
        return str(error)
    return ""


def _check_finite(key: str, value: Any, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"{key}: nested too deeply")
    if isinstance(value, int | float) and not abs(value) < _LARGEST:
        raise _wrong(key, value, "a finite number")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_finite(key, item, depth + 1)


def check_result(result: Mapping[str, Any], best: str) -> None:
    """Raises ValueError if this is not a result to compare by a metric; `NotMeasured` if that metric is not among its own."""
    for name in ("params", "macs", "seconds"):
        if not _is_number(result.get(name)) or result[name] < 0:
            raise _wrong(name, result.get(name), "a number of at least 0")
    for name in ("dense_steps", "guided_steps"):
        if not is_count(result.get(name, 0)):  # earlier versions wrote none
            raise _wrong(name, result[name], "a whole number of at least 0")
    for name in ("eval", "valid", "eval_raw", "valid_raw"):
        evaluated = result.get(name)
        if evaluated is None and name != "eval":
            continue
        if not isinstance(evaluated, dict):
            raise _wrong(name, evaluated, "a mapping of metrics")
        check_metrics(evaluated, f"{name}/")
        if name == "eval" and best not in evaluated:
            raise NotMeasured(f"its result has no {best}, by which its checkpoints were chosen")
        for metric in (best, "loss") if name in ("eval", "valid") else ():
            nobody = metric in evaluated and metric not in COUNT_ALL
            if evaluated.get(metric) is None and not nobody:
                raise _wrong(f"{name}/{metric}", evaluated.get(metric), "a number")
    versions = result.get("versions")
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise _wrong("versions", versions, "a mapping of strings")


def check_metrics(metrics: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ValueError unless every metric is a number, or null, and the accuracies are fractions."""
    for name, value in metrics.items():
        if value is not None and not _is_number(value):
            raise _wrong(prefix + name, value, "a finite number")
        if value is not None and not 0 <= value <= _ONE and name.rpartition("/")[2] in ("top1", "top5"):
            raise _wrong(prefix + name, value, "from 0 to 1")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def failure(note: Mapping[str, Any]) -> tuple[str, str]:
    """Status and reason by failure.json.  Raises ValueError if it holds no such thing."""
    status, reason = note.get("status", "failed"), note.get("reason", "")
    if status not in ("diverged", "failed"):
        raise _wrong("status", status, "diverged or failed")
    if not isinstance(reason, str):
        raise _wrong("reason", reason, "a string")
    return status, reason


def stop(note: Mapping[str, Any]) -> tuple[str, str]:
    """The same by stopped.json."""
    by, step = note.get("by"), note.get("step")
    if not isinstance(by, str):
        raise _wrong("by", by, "a string")
    if not is_count(step):
        raise _wrong("step", step, "a whole number of at least 0")
    return "stopped", f"by {by} at step {step}"


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name}: {reprlib.repr(value)}; must be {expected}")
