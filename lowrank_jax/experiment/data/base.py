"""The types that everything about data shares: data set, split, source."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.frozen import FrozenDict

Batch = dict[str, np.ndarray]


class DataError(UserError):
    """Data is missing or unusable; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to read images of many sizes.

    Attributes:
      eval_crop: side of the central crop for evaluation, as a fraction of the image's shorter side.
      max_undecodable: maximum number of undecodable images of a split, in each process.
      exif: turn and mirror an image as its EXIF orientation says; otherwise it is taken as it is stored.
      alpha: what shows through transparent pixels: "white", "black", or "drop" for the colours that are stored there.
    """

    eval_crop: float = 0.875
    max_undecodable: int = 10
    exif: bool = False
    alpha: str = "drop"


@dataclasses.dataclass(frozen=True)
class Field:
    """What every example holds under one name: an array of this shape and type."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known about a data set.

    Attributes:
      name: as in a config.
      image_shape: `(height, width, channels)` of the images that a network gets, or `(features,)` of plain vectors.
      num_classes: labels run from 0 to num_classes - 1, whatever their shape; None if they are no classes.
      sizes: the number of examples in each split.
      mean, std: per channel, or per feature, of the training split: of pixels scaled to [0, 1], or of floating-point inputs as
        they are.  Empty if they have not been measured.
      prepare: the command that prepares it; empty if it is made on first use, or is the user's own.
      decoding: set if images are stored encoded, or in many sizes; None if they are arrays of one size.
      whole: images that are stored encoded have one size, and are decoded whole, into memory.
      classes: what the labels mean; a network can be evaluated on other data sets of the same classes.  Default: the name.
      partial: whether `dataset.kwargs` can state smaller sizes, of a part that was prepared on purpose.
      image_dtype: "uint8", or "float32".
      label: of one example: `()` and int32 for one class; another shape for a map of classes, or for numbers.
      extras: what else every example holds, by name, for an objective of the user's.
      class_names: of the labels, in order; empty if there are none.
      digest: by which a change of the user's own data is noticed; empty if the data is published.
      origin: what the source reads it by, besides its name; can be hashed.
      notes: what the user should know before training, one line each.
      skipped: the number of files that are left out, by the reason.
    """

    name: str
    image_shape: tuple[int, ...]
    num_classes: int | None
    sizes: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prepare: str = ""
    decoding: Decoding | None = None
    classes: str = ""
    partial: bool = False
    image_dtype: str = "uint8"
    label: Field = Field((), "int32")
    extras: dict[str, Field] = FrozenDict()
    class_names: tuple[str, ...] = ()
    digest: str = ""
    whole: bool = False
    origin: Any = None
    notes: tuple[str, ...] = ()
    skipped: dict[str, int] = FrozenDict()

    def __post_init__(self):
        object.__setattr__(self, "classes", self.classes or self.name)
        object.__setattr__(self, "sizes", FrozenDict(self.sizes))  # a data set is a key of caches
        object.__setattr__(self, "extras", FrozenDict(self.extras))
        object.__setattr__(self, "skipped", FrozenDict(self.skipped))

    @property
    def fields(self) -> dict[str, Field]:
        """What a batch of examples holds, by name, each with a first axis for the examples."""
        return {"image": Field(self.image_shape, self.image_dtype), "label": self.label, **self.extras}

    @property
    def cropped(self) -> bool:
        """Whether images have many sizes, so that training crops them at random and evaluation takes their centres."""
        return self.decoding is not None and not self.whole

    @property
    def is_images(self) -> bool:
        """Whether the inputs are images; otherwise they are plain vectors."""
        return len(self.image_shape) == 3

    @property
    def outputs(self) -> int:
        """How many numbers a network gives for each example, or for each place of it: a logit a class, or a number a target."""
        return self.num_classes or (self.label.shape[-1] if self.label.shape else 1)


class Split(Protocol):
    """Examples by index: batches of `image`, `label` and whatever else `Dataset.fields` lists, each `[batch, ...]`."""

    @property
    def prefetch(self) -> int:
        """Number of batches to prefetch, on other threads."""
        ...

    @property
    def undecodable(self) -> dict[int, str]:
        """Names of the examples that this process could not decode so far, by index."""
        ...

    def __len__(self) -> int: ...

    def all_labels(self) -> np.ndarray:
        """The labels of all examples, `[size, ...]`; no image is decoded."""
        ...

    def augmented(self, index: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> Batch:
        """Training examples at `index`, each augmented with its own 64 random bits; both `[batch]`."""
        ...

    def plain(self, index: np.ndarray) -> Batch:
        """Evaluation examples at `index`, `[batch]`, with a float32 `mask` `[batch]` that is 0 where there is no image."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """What a config says of a data set besides its name and its own settings.

    Attributes:
      data_dir: where data is looked for; None for the usual place.
      code_dir: where the user's own code is looked up besides installed packages; None for nowhere.
      image_size: the side at which images of many sizes are read; None for the data set's own.
    """

    data_dir: str | None = None
    code_dir: str | None = None
    image_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """How a data set is described and read.

    Attributes:
      describe: the data set, from an instance of `options` and a `Request`.  Raises DataError if its data has to be looked at,
        and cannot be used.
      load: opens a split, from the data set, the split's name with slices, and TFDS's data folder (None for its default).
      options: a dataclass of the legal `dataset.kwargs`; None if the data set takes none.
      free_options: any `dataset.kwargs` are legal, and `describe` gets them as a mapping: only the user's code knows them.
    """

    describe: Callable[[Any, Request], Dataset]
    load: Callable[[Dataset, str, str | None], Split]
    options: type[Any] | None = None
    free_options: bool = False


def positive(default: Any) -> Any:
    """A field of options whose value, or every one of its values, must be at least 1."""

    def check(value: Any) -> str | None:
        return None if min(value if isinstance(value, tuple) else (value,)) >= 1 else "must be at least 1"

    return dataclasses.field(default=default, metadata={"check": check})


def one_of(*values: Any) -> Any:
    """A field of options that has one of these values, by default the first."""

    def check(value: Any) -> str | None:
        return None if value in values else f"must be one of {', '.join(map(str, values))}"

    return dataclasses.field(default=values[0], metadata={"check": check})
