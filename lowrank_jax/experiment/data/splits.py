"""Splits with slices, such as "train[:90%]": their parts, sizes and overlaps."""

import dataclasses
from typing import Any

from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.text import did_you_mean


def split_parts(dataset: Dataset, split: str) -> list[tuple[str, int, int]]:
    """A split in TFDS's slicing syntax, such as "train[:90%]", as ranges of stored splits: `(name, start, stop)`.

    Raises:
      ValueError: there is no such split, the syntax is wrong, or a range is empty.
    """
    import tensorflow_datasets as tfds

    bare = [part.split("[")[0].strip() for part in split.split("+")]
    for name in bare:
        if name not in dataset.sizes:
            raise ValueError(f"{dataset.name} has no split {name!r}{did_you_mean(name, dataset.sizes)}")
    if "shard" in split:
        raise ValueError(f"split {split!r} uses shards; slice by examples or per cent, as in {bare[0]}[:10%]")
    try:
        instruction: Any = tfds.core.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({name: _SplitSize(size) for name, size in dataset.sizes.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split {split!r} cannot be parsed: {error}") from None
    ranges = [
        (part.splitname, part.from_ or 0, dataset.sizes[part.splitname] if part.to is None else part.to) for part in parts
    ]
    if any(start >= stop for _, start, stop in ranges):
        raise ValueError(f"split {split!r} contains an empty slice; its end must come after its start")
    return ranges


@dataclasses.dataclass(frozen=True)
class _SplitSize:
    """The attribute of TFDS's split info that slicing reads."""

    num_examples: int


def split_size(dataset: Dataset, split: str) -> int:
    """The number of examples of a split, with slices."""
    return sum(stop - start for _, start, stop in split_parts(dataset, split))


def share_examples(dataset: Dataset, one: str, other: str) -> bool:
    """Whether two splits have an example in common."""
    return any(
        name == other_name and max(start, other_start) < min(stop, other_stop)
        for name, start, stop in split_parts(dataset, one)
        for other_name, other_start, other_stop in split_parts(dataset, other)
    )
