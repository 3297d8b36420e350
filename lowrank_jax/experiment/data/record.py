"""A data set's description as JSON, as a work directory keeps it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank_jax.experiment.data.base import Dataset, Decoding, Field


def to_record(dataset: Dataset) -> dict[str, Any]:
    """What is known about a data set, in plain values."""
    record = dataclasses.asdict(dataset)
    for name in ("origin", "notes", "prepare", "partial"):
        del record[name]
    return record


def from_record(record: Mapping[str, Any]) -> Dataset:
    """The description that `to_record` wrote.

    Raises:
      ValueError: it is none; the message says what is wrong.
    """
    try:
        values = {name: _tuples(value) for name, value in record.items() if name in _NAMES}
        label, decoding = Field(**values.pop("label")), values.pop("decoding")
        extras = {name: Field(**field) for name, field in values.pop("extras").items()}
        dataset = Dataset(**values, label=label, extras=extras, decoding=Decoding(**decoding) if decoding else None)
        channels = dataset.image_shape[-1]
        wrong = [name for name in ("mean", "std") if not _are_numbers(getattr(dataset, name), channels)]
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"it does not describe a data set ({error})") from None
    if wrong:
        raise ValueError(f"its {' and '.join(wrong)} must be {channels} numbers")
    return dataset


_NAMES = {field.name for field in dataclasses.fields(Dataset)} - {"origin", "notes", "prepare", "partial"}


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _are_numbers(values: Any, count: int) -> bool:
    if not isinstance(values, tuple) or len(values) != count:
        return False
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def changes(old: Dataset, new: Dataset) -> list[str]:
    """A line for each difference between the data a run began with and what is there now; empty if there is none."""
    if old.digest == new.digest:
        return []
    lines = [
        f"{split} has {new.sizes.get(split, 0):,} examples, {old.sizes.get(split, 0):,} before"
        for split in dict.fromkeys((*old.sizes, *new.sizes))
        if old.sizes.get(split) != new.sizes.get(split)
    ]
    gone = [name for name in old.class_names if name not in new.class_names]
    come = [name for name in new.class_names if name not in old.class_names]
    lines += [f"the class {name!r} is gone" for name in gone] + [f"the class {name!r} is new" for name in come]
    return lines or ["as many examples of the same classes, but not the same ones"]
