"""A data set's description as JSON, as a work directory keeps it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lowrank_jax.experiment.config.typed import read_value
from lowrank_jax.experiment.data.base import Dataset, Decoding, Field
from lowrank_jax.text import shown

_TYPES: dict[str, Any] = {
    "name": str,
    "image_shape": tuple[int, ...],
    "num_classes": int | None,
    "mean": tuple[float, ...],
    "std": tuple[float, ...],
    "whole": bool,
    "classes": str,
    "image_dtype": str,
    "class_names": tuple[str, ...],
    "digest": str,
}
_DECODING: dict[str, Any] = {"eval_crop": float, "max_undecodable": int, "exif": bool, "alpha": str}


def to_record(dataset: Dataset) -> dict[str, Any]:
    """What is known about a data set, in plain values."""
    values = dataclasses.asdict(dataset)
    return {name: values[name] for name in (*_TYPES, "sizes", "label", "extras", "decoding", "skipped")}


def from_record(record: Mapping[str, Any]) -> Dataset:
    """The description that `to_record` wrote.

    Raises:
      ValueError: it is none; the message says what is wrong.
    """
    values = {name: _value(record, name, hint) for name, hint in _TYPES.items()}
    decoding = record.get("decoding")
    dataset = Dataset(
        **values,
        sizes=_counts(record, "sizes"),
        label=_field(record, "label"),
        extras={name: _field(record["extras"], name) for name in _mapping(record, "extras")},
        decoding=decoding and Decoding(**{name: _value(decoding, name, hint) for name, hint in _DECODING.items()}),
        skipped=_counts(record, "skipped"),
    )
    if dataset.class_names and dataset.num_classes not in (None, len(dataset.class_names)):
        raise ValueError(f"its class_names must be {dataset.num_classes}, as its num_classes says")
    for name, field in dataset.fields.items():
        _check_dtype(name, field.dtype)
    channels = dataset.image_shape[-1] if dataset.image_shape else 0
    for name, given in (("mean", dataset.mean), ("std", dataset.std)):
        if len(given) != channels or (name == "std" and min(given) <= 0):
            raise ValueError(f"its {name} must be {channels} numbers{' above 0' if name == 'std' else ''}")
    return dataset


def _value(values: Any, name: str, hint: Any) -> Any:
    if not isinstance(values, Mapping) or name not in values:
        raise ValueError(f"it has no {name}")
    try:
        return read_value(values[name], hint)
    except ValueError as error:
        raise ValueError(f"its {name} must be {error}") from None


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    if not isinstance(found, Mapping):
        raise ValueError(f"its {name} must be an object")
    return found


def _counts(values: Mapping[str, Any], name: str) -> dict[str, int]:
    found = _mapping(values, name)
    return {key: _value(found, key, int) for key in found}


def _field(values: Mapping[str, Any], name: str) -> Field:
    found = _mapping(values, name)
    return Field(_value(found, "shape", tuple[int, ...]), _value(found, "dtype", str))


def _check_dtype(name: str, dtype: str) -> None:
    try:
        is_number = np.dtype(dtype).kind in "biuf"
    except TypeError:
        is_number = False
    if not is_number:
        raise ValueError(f"its {name} is of the type {shown(dtype)}, which is none of numbers")


def changes(old: Dataset, new: Dataset) -> list[str]:
    """A line for each difference between the data a run began with and what is there now; empty if there is none."""
    if old.digest == new.digest:
        return misfits(old, new)
    lines = [
        f"{split} has {new.sizes.get(split, 0):,} examples, {old.sizes.get(split, 0):,} before"
        for split in dict.fromkeys((*old.sizes, *new.sizes))
        if old.sizes.get(split) != new.sizes.get(split)
    ]
    return [*lines, *misfits(old, new)] or ["as many examples of the same classes, but not the same ones"]


def misfits(old: Dataset, new: Dataset) -> list[str]:
    """The same of what a network is made for: its inputs and its labels.  Published data never differs in these."""
    if not old.digest:
        return []
    lines = [f"{what} are {told(new)}, {told(old)} before" for what, told in _MADE_FOR.items() if told(old) != told(new)]
    gone = [name for name in old.class_names if name not in new.class_names]
    come = [name for name in new.class_names if name not in old.class_names]
    lines += [f"the class {name!r} is gone" for name in gone] + [f"the class {name!r} is new" for name in come]
    return lines or (["the classes are in another order"] if old.class_names != new.class_names else [])


def _told(field: Field) -> str:
    return f"{'x'.join(map(str, field.shape)) or 'single numbers'} {field.dtype}"


_MADE_FOR: dict[str, Callable[[Dataset], str]] = {
    "inputs": lambda dataset: _told(dataset.fields["image"]) + (", cropped from many sizes" if dataset.cropped else ""),
    "labels": lambda dataset: _told(dataset.label),
    "classes": lambda dataset: "none" if dataset.num_classes is None else f"{dataset.num_classes:,}",
}
