"""TFDS data sets of encoded images of many sizes, read from disk as they are needed."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lowrank_jax.experiment.data.base import Dataset, Source, Split
from lowrank_jax.experiment.data.sources.tfds_prepared import Prepared, open_prepared
from lowrank_jax.experiment.data.splits import split_parts


def source(dataset: Dataset, options: type[Any] | None = None, describe: Callable[[Any], Dataset] | None = None) -> Source:
    """A data set of TFDS's by its description, whose name is TFDS's; `describe` applies its options, if it takes any."""
    described = describe or (lambda options: dataset)
    return Source(lambda options, request: described(options), _load, options)


def _load(dataset: Dataset, split: str, data_dir: str | None) -> Split:
    split_parts(dataset, split)  # a split that is none is named first
    return open_records(open_prepared(dataset, data_dir), split)


def open_records(prepared: Prepared, split: str) -> Split:
    """Makes sure that the split is there, and reads nothing of it."""
    import tensorflow_datasets as tfds

    from lowrank_jax.experiment.data.encoded import EncodedImages
    from lowrank_jax.experiment.data.tf_examples import TFExamples

    dataset, keys = prepared.dataset, prepared.keys
    parts = split_parts(dataset, split)
    names = {name for name, *_ in parts}
    for name in names:
        prepared.check_split(name)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    stored: dict[str, Any] = {name: prepared.builder.as_data_source(name, deserialize_method=raw) for name in names}
    records = [(stored[name].data_source, start, stop) for name, start, stop in parts]
    examples = TFExamples(f"{dataset.name}/{split}", records, prepared.remedy, dataset.label, **dataclasses.asdict(keys))
    return EncodedImages(dataset, split, examples, f"prepare the data again: {prepared.remedy}")
