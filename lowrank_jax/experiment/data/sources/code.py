"""`package.module:function`: data that a function of the user's returns, or a TFDS builder of the user's."""

import dataclasses
import difflib
import functools
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_jax.experiment.data.arrays import Arrays, check_memory, joined
from lowrank_jax.experiment.data.augment import Augmentation, augment
from lowrank_jax.experiment.data.base import Batch, DataError, Dataset, Decoding, Field, Request, Source, Split
from lowrank_jax.experiment.data.encoded import EncodedImages, Example
from lowrank_jax.experiment.data.kept import Kept
from lowrank_jax.experiment.data.own import Data, Items, arrays_of, check_deterministic, digest_of, field_of, with_facts
from lowrank_jax.experiment.data.progress import Progress
from lowrank_jax.experiment.data.sources import tfds_builder
from lowrank_jax.experiment.data.sources.folder import DEFAULT_SIZE, SMALL_SIDE, SMALL_TOTAL, classes_of
from lowrank_jax.experiment.data.sources.tfds_prepared import Keys
from lowrank_jax.experiment.data.splits import split_parts
from lowrank_jax.experiment.data.statistics import one_sided
from lowrank_jax.experiment.frozen import FrozenDict, thaw
from lowrank_jax.named_code import folder_kept, import_attribute
from lowrank_jax.text import did_you_mean, first_line, shown

_SAMPLED = 16  # examples of a split that are read to see what it holds
_DECODING = Decoding(exif=True, alpha="white")


def source(argument: str, name: str) -> Source:
    """The data of a function by its name."""
    del argument
    return Source(lambda options, request: _describe(name, options, request), _load, free_options=True)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What the data is made from."""

    name: str
    kwargs: FrozenDict
    code_dir: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """What a function returned: arrays or items by split, and what is known of their examples."""

    data: Data
    splits: dict[str, Arrays | Items]
    samples: dict[str, list[Example]]
    digest: str


def _describe(name: str, options: Mapping[str, Any], request: Request) -> Dataset:
    origin = _Origin(name, FrozenDict(options), request.code_dir)
    named = _imported(origin)
    if _is_builder(named):
        return tfds_builder.own_builder(name, named, _keys(name, options), request)
    return describe_found(name, origin, _found(origin), request.image_size)


def _imported(origin: _Origin) -> Any:
    try:
        return import_attribute(origin.name, "data set", **({"folder": origin.code_dir} if origin.code_dir else {}))
    except ValueError as error:
        prefix, _, rest = origin.name.partition(":")
        close = difflib.get_close_matches(prefix, ("folder", "tfds", "arrays"), n=1)
        raise DataError(f"{error}{f'; did you mean {close[0]}:{rest}?' if close else ''}") from None


def _is_builder(named: Any) -> bool:
    """Whether this is a builder class of TFDS's kind; TFDS is not imported for that."""
    bases = named.__mro__ if isinstance(named, type) else ()
    return any(base.__name__ == "DatasetBuilder" and base.__module__.startswith("tensorflow_datasets.") for base in bases)


def _keys(name: str, options: Mapping[str, Any]) -> Keys:
    """The settings of a builder."""
    legal = [field.name for field in dataclasses.fields(Keys)]
    unknown = [
        f"dataset.kwargs.{key}: {name} has no such setting{did_you_mean(key, legal)}" for key in options if key not in legal
    ]
    wrong = {key: value for key, value in options.items() if key in legal and not isinstance(value, str)}
    if problems := unknown + [f"dataset.kwargs.{key}: {shown(value)}; must be a string" for key, value in wrong.items()]:
        raise DataError("\n".join(problems))
    return Keys(**options)


@functools.lru_cache(maxsize=2)  # asked for again and again by a run
def describe_found(name: str, origin: Any, found: _Found, image_size: int | None) -> Dataset:
    """The description of data that is checked already."""
    fields, decoding = _fields(name, found, image_size)
    label = fields.pop("label")
    image = fields.pop("image")
    num_classes = _num_classes(name, found, label)
    names = tuple(found.data.class_names) or _named_by_features(found)
    if names and num_classes and len(names) != num_classes:
        raise DataError(f"{name} has {len(names)} class names for {num_classes} classes")
    for what, given in {"mean": found.data.mean, "std": found.data.std}.items():
        if given and len(given) != image.shape[-1]:
            raise DataError(
                f"{name}: its {what} has {len(given)} numbers; its inputs have {image.shape[-1]} channels or features"
            )
    return Dataset(
        name,
        image.shape,
        num_classes,
        {split: len(examples) for split, examples in found.splits.items()},
        tuple(found.data.mean),
        tuple(found.data.std),
        decoding=decoding,
        classes=classes_of(names) if len(names) > 1 else "",
        image_dtype=image.dtype,
        label=label,
        extras=fields,
        class_names=names,
        digest=found.digest,
        origin=origin,
        notes=tuple(_notes(found, num_classes, names)),
    )


def _call(origin: _Origin) -> _Found:
    function = _imported(origin)
    if not callable(function):
        raise DataError(f"{origin.name} is {shown(function)}; expected a function that returns splits by name")
    kwargs = thaw(origin.kwargs)
    _check_arguments(origin.name, function, kwargs)
    try:
        with folder_kept():
            made = function(**kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's function may raise, SystemExit too
        raise DataError(f"{origin.name} failed ({type(error).__name__}: {first_line(error)})") from error
    return check_data(origin.name, made)


_found = Kept(_call)


def _check_arguments(name: str, function: Any, kwargs: dict[str, Any]) -> None:
    """Raises DataError for arguments that a function does not take, or lacks."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    taken = signature.parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        for key in kwargs:
            if key not in taken:
                raise DataError(f"dataset.kwargs.{key}: {name} has no such argument{did_you_mean(key, taken)}")
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise DataError(f"dataset.kwargs: {name} cannot be called: {error}") from None


def check_data(name: str, made: Any) -> _Found:
    """What somebody's function returned, checked.  Raises DataError with what is wrong."""
    data = with_facts(made if isinstance(made, Data) else Data(made), name)
    if not isinstance(data.splits, Mapping) or not data.splits:
        raise DataError(f"{name} returned {shown(made)}; expected splits by name, such as {{'train': (images, labels), ...}}")
    splits: dict[str, Arrays | Items] = {}
    samples: dict[str, list[Example]] = {}
    parts: dict[str, Any] = {"digest": data.digest}
    for split, given in data.splits.items():
        if not re.fullmatch(r"\w+", str(split)):
            raise DataError(f"{name}: {split!r} cannot be the name of a split; use letters, digits and _")
        examples = arrays_of(given, f"{name}/{split}")
        if examples is None:
            if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
                raise DataError(f"{name}/{split} is {shown(given)}; expected arrays (images, labels), or examples by index")
            examples = Items(given, f"{name}/{split}", data.channels, _DECODING)
        if not len(examples):
            raise DataError(f"{name}/{split} is empty; leave it out")
        splits[str(split)] = examples
        if isinstance(examples, Arrays):
            held = {"image": examples.images, "label": examples.labels, **examples.extras}
            parts |= {f"{split}/{key}": array for key, array in held.items()}
            continue
        samples[str(split)] = check_deterministic(examples, _sampled(len(examples)))
        parts[f"{split}/size"] = len(examples)
        for one in samples[str(split)]:
            parts |= {f"{one.name}/{key}": value for key, value in {"image": one.image, **one.others}.items()}
    return _Found(data, splits, samples, digest_of(parts))


def _sampled(size: int) -> list[int]:
    """Indices over a whole split, the first and the last one included."""
    return np.unique(np.linspace(0, size - 1, min(size, _SAMPLED)).round().astype(int)).tolist()


def _fields(name: str, found: _Found, image_size: int | None) -> tuple[dict[str, Field], Decoding | None]:
    """What every example holds, and how images are decoded if they have many sizes.  All splits must agree."""
    known: dict[str, dict[str, Field]] = {}
    many = image_size is not None and bool(found.samples)
    for split, examples in found.splits.items():
        if isinstance(examples, Arrays):
            held = {"image": examples.images, "label": examples.labels, **examples.extras}
            known[f"{split}"] = {key: field_of(array, whole_split=True) for key, array in held.items()}
            continue
        for index, one in zip(_sampled(len(examples)), found.samples[split], strict=True):
            image = examples.decoded(index).image
            held = {"image": image, **one.others}
            fields = {key: field_of(np.asarray(value), whole_split=False) for key, value in held.items()}
            many = many or (not isinstance(one.image, np.ndarray) and max(fields["image"].shape[:2]) > SMALL_SIDE)
            known[one.name] = fields
    (first, expected), *others = known.items()
    for other, fields in others:
        many = many or fields["image"].shape != expected["image"].shape
        for key in {**expected, **fields}:
            if _comparable(key, fields.get(key)) != _comparable(key, expected.get(key)):
                raise DataError(
                    f"{name}: {key} is {_told(fields.get(key))} in {other}, but {_told(expected.get(key))} in {first}"
                )
    if not many:
        return expected, None
    return {**expected, "image": _of_many_sizes(name, found, expected["image"])}, _DECODING


def _comparable(key: str, field: Field | None) -> Any:
    """What has to be the same in all examples: of images of many sizes the number of axes, the channels and the type."""
    if key != "image" or field is None:
        return field
    return len(field.shape), field.shape[-1], field.dtype


def _told(field: Field | None) -> str:
    return "missing" if field is None else f"{'x'.join(map(str, field.shape)) or 'a number'} {field.dtype}"


def _of_many_sizes(name: str, found: _Found, image: Field) -> Field:
    if any(isinstance(examples, Arrays) for examples in found.splits.values()):
        raise DataError(f"{name}: its splits have images of several sizes; give all one size, or examples by index")
    if image.dtype != "uint8" or len(image.shape) != 3 or image.shape[-1] not in (1, 3):
        raise DataError(f"{name}: inputs of several sizes must be uint8 images of 1 or 3 channels; it has {_told(image)}")
    return Field((DEFAULT_SIZE, DEFAULT_SIZE, image.shape[-1]), "uint8")


_MOST_CLASSES = 2**24  # of a network: more are no classes, but such as the numbers of rows


def _num_classes(name: str, found: _Found, label: Field) -> int | None:
    """The number of classes; None if labels are no classes."""
    if label.dtype != "int32":
        return None
    arrays = {split: examples for split, examples in found.splits.items() if isinstance(examples, Arrays)}
    known = found.data.num_classes or len(found.data.class_names) or len(_named_by_features(found))
    if not known and len(arrays) < len(found.splits):
        raise DataError(f"{name} does not say how many classes there are; return Data(splits, num_classes=...) of lowrank_jax")
    largest = max((int(examples.labels.max()) for examples in arrays.values()), default=-1)
    what = "num_classes" if found.data.num_classes else "the largest label"
    known = known or largest + 1
    if known > _MOST_CLASSES:
        raise DataError(f"{name}: {what} makes {known:,} classes; labels are whole numbers from 0 on, one for each class")
    for split, examples in arrays.items():
        low, high = int(examples.labels.min()), int(examples.labels.max())
        if low < 0 or high >= known:
            wrong = low if low < 0 else high
            raise DataError(f"{name}/{split} has the label {wrong}; labels must be from 0 to {known - 1}")
    return known


def _named_by_features(found: _Found) -> tuple[str, ...]:
    """The class names that a data set of Hugging Face's knows."""
    for split in found.data.splits.values():
        features = getattr(split, "features", None)
        label = features.get("label") if isinstance(features, Mapping) else None
        if names := getattr(label, "names", None):
            return tuple(map(str, names))
    return ()


def _notes(found: _Found, num_classes: int | None, names: tuple[str, ...]) -> list[str]:
    present = {split: set(np.unique(e.labels).tolist()) for split, e in found.splits.items() if isinstance(e, Arrays)}
    if not num_classes:
        return []
    return one_sided(present, [*range(num_classes)], names or [f"class {i}" for i in range(num_classes)])


class _ByIndex:
    """A split of items of one size that is too large for memory, or of many sizes: some of them, in order."""

    prefetch = 2
    undecodable: dict[int, str] = {}  # noqa: RUF012 - what cannot be decoded ends the run

    def __init__(self, dataset: Dataset, parts: list[tuple[Items, int, int]]):
        self._dataset, self._parts = dataset, parts
        self._starts = np.cumsum([0, *(stop - start for _, start, stop in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, index: int) -> tuple[Items, int]:
        """The items and the index there."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        items, start, _ = self._parts[part]
        return items, start + index - int(self._starts[part])

    def __getitem__(self, index: int) -> Example:
        items, place = self.place(index)
        example, (*_, channels) = self._checked(items.read(place)), self._dataset.image_shape
        image = example.image
        if isinstance(image, np.ndarray) and (image.ndim, image.shape[-1], str(image.dtype)) != (3, channels, "uint8"):
            found = _told(Field(image.shape, str(image.dtype)))
            raise DataError(
                f"{example.name} is {found}; images of many sizes must be uint8 with {channels} channels, as others are"
            )
        return example

    def labels(self) -> np.ndarray:
        """Of all items, which are read for that."""
        return np.stack([self[index].others["label"] for index in range(len(self))])

    def all_labels(self) -> np.ndarray:
        """The labels of all examples, `[size, ...]`."""
        return self.labels()

    def _checked(self, example: Example) -> Example:
        """Raises DataError unless the example is as described, apart from its image."""
        for key, field in self._dataset.fields.items():
            if key == "image":
                continue
            value = example.others.get(key)
            if value is None or (value.shape, str(value.dtype)) != (field.shape, field.dtype):
                found = None if value is None else Field(value.shape, str(value.dtype))
                raise DataError(f"{example.name}: {key} is {_told(found)}, but {_told(field)} in other examples")
        label, classes = example.others["label"], self._dataset.num_classes
        if classes and (np.min(label) < 0 or np.max(label) >= classes):
            raise DataError(f"{example.name} has the label {shown(label.tolist())}; labels must be from 0 to {classes - 1}")
        others = {key: value for key, value in example.others.items() if key in self._dataset.fields}
        return Example(example.image, others, example.name)

    def _stacked(self, index: np.ndarray) -> Batch:
        batch = {key: np.empty((len(index), *field.shape), field.dtype) for key, field in self._dataset.fields.items()}
        for row, place in enumerate(index.tolist()):
            items, at = self.place(place)
            example = self._checked(items.decoded(at))
            image = np.asarray(example.image)
            if image.shape != self._dataset.image_shape:
                raise DataError(
                    f"{example.name} is {_told(Field(image.shape, str(image.dtype)))}, others are"
                    f" {'x'.join(map(str, self._dataset.image_shape))}; give all one size, or set dataset.image_size"
                )
            for key, value in {"image": image, **example.others}.items():
                batch[key][row] = value
        return batch

    def augmented(self, index: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> Batch:
        """Training examples, each augmented with its own bits."""
        batch = self._stacked(index)
        return {**batch, "image": augment(batch["image"], bits, augmentation)}

    def plain(self, index: np.ndarray) -> Batch:
        """Evaluation examples; every `mask` is 1."""
        return {**self._stacked(index), "mask": np.ones(len(index), np.float32)}


def _load(dataset: Dataset, split: str, data_dir: str | None) -> Split:
    if not isinstance(dataset.origin, _Origin):
        return tfds_builder.load(dataset, split, data_dir)
    return load_found(dataset, _found(dataset.origin), split)


def load_found(dataset: Dataset, found: _Found, split: str) -> Split:
    """A split of data that is checked already."""
    parts = [(found.splits[name], start, stop) for name, start, stop in split_parts(dataset, split)]
    name = f"{dataset.name}/{split}"
    if all(isinstance(examples, Arrays) for examples, _, _ in parts):
        return joined([_cut(examples, start, stop) for examples, start, stop in parts if isinstance(examples, Arrays)])
    items = [part for part in parts if isinstance(part[0], Items)]
    if len(items) < len(parts):
        raise DataError(f"{name} joins arrays and examples by index; use one of them at a time")
    by_index = _ByIndex(dataset, items)  # type: ignore[arg-type]
    if dataset.decoding is not None:
        return EncodedImages(dataset, split, by_index, "mend or leave out these images")
    size = len(by_index) * math.prod(dataset.image_shape) * np.dtype(dataset.image_dtype).itemsize
    if size > SMALL_TOTAL:
        return by_index
    check_memory(dataset, name, len(by_index))
    return _in_memory(by_index, name)


def _cut(arrays: Arrays, start: int, stop: int) -> Arrays:
    extras = {key: array[start:stop] for key, array in arrays.extras.items()}
    return Arrays(arrays.images[start:stop], arrays.labels[start:stop], extras)


_PART = 1024


def _in_memory(examples: _ByIndex, name: str) -> Arrays:
    told, parts = Progress(f"reading {name}", len(examples)), []
    for start in range(0, len(examples), _PART):
        parts.append(examples.plain(np.arange(start, min(start + _PART, len(examples)))))
        told.at(min(start + _PART, len(examples)))
    batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0] if key != "mask"}
    return Arrays(batch.pop("image"), batch.pop("label"), batch)
