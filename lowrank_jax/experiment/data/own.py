"""The user's own data as a function returns it: checked, and brought into the form that training reads.

A split is a pair or a mapping of arrays, or anything with a length that gives an example by index: a list, a Grain data source,
a data set of Hugging Face's.
"""

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lowrank_jax.experiment.data.arrays import Arrays
from lowrank_jax.experiment.data.base import DataError, Decoding, Field
from lowrank_jax.experiment.data.decode import Undecodable, decode_whole, pixels
from lowrank_jax.experiment.data.encoded import Example
from lowrank_jax.experiment.data.orientation import UPRIGHT, orientation_of_image
from lowrank_jax.text import first_line, shown


@dataclasses.dataclass(frozen=True)
class Data:
    """Data of one's own, with what cannot be seen from its examples.

    Attributes:
      splits: by name: `(images, labels)` as arrays, or a mapping of arrays `image`, `label` and whatever an objective takes
        besides; or something with `__len__` and `__getitem__` that gives the same of one example.
      num_classes: labels run from 0 to num_classes - 1; by default as many as there are class names, or as the labels say.
      class_names: in the order of the labels.
      mean, std: of the inputs, by channel or feature (pixels scaled to [0, 1]); measured over the training split if empty.
      channels: of images that are encoded or Pillow's: 3 for RGB, 1 for grey.
      digest: a text that changes when the data does; arrays, and some of the examples, are compared anyway.
    """

    splits: Mapping[str, Any]
    num_classes: int | None = None
    class_names: Sequence[str] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    channels: int = 3
    digest: str = ""


def with_facts(data: Data, name: str) -> Data:
    """The same data with everything but its splits checked, and as plain values.

    Raises:
      DataError: something is not what it should be.
    """
    if data.channels not in (1, 3):
        raise DataError(f"{name}: its channels are {shown(data.channels)}; give 3 for RGB, or 1 for grey")
    return dataclasses.replace(
        data,
        num_classes=_class_count(data.num_classes, name),
        class_names=_names(data.class_names, name),
        mean=_statistics(data.mean, f"{name}: its mean", -np.inf, "finite numbers"),
        std=_statistics(data.std, f"{name}: its std", float(np.finfo(np.float32).tiny), "finite numbers above 0"),
    )


def _class_count(given: Any, name: str) -> int | None:
    if given is None:
        return None
    value = np.asarray(given)
    if value.ndim or not np.issubdtype(value.dtype, np.integer) or value < 1:
        raise DataError(f"{name}: its num_classes is {shown(given)}; give a whole number of at least 1")
    return int(value)


def _names(given: Any, name: str) -> tuple[str, ...]:
    if isinstance(given, str) or np.ndim(given) != 1:
        raise DataError(f"{name}: its class_names are {shown(given)}; give a list of names")
    names = tuple(map(str, given))
    if twice := next((one for one, times in collections.Counter(names).items() if times > 1), None):
        raise DataError(f"{name}: its class_names have {twice!r} more than once; give each class a name of its own")
    return names


def _statistics(given: Any, what: str, least: float, expected: str) -> tuple[float, ...]:
    try:
        values = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        values = np.array(np.nan, np.float32)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < least).any():
        raise DataError(f"{what} is {shown(given)}; give a list of {expected}, one for each channel")
    return tuple(map(float, given))


def arrays_of(split: Any, name: str) -> Arrays | None:
    """A split that is a pair or a mapping of arrays, checked; None if it is something else.

    Raises:
      DataError: the arrays cannot be used; `name` is what to call the split.
    """
    if isinstance(split, tuple) and len(split) == 2 and all(hasattr(part, "shape") for part in split):
        split = dict(zip(("image", "label"), split, strict=True))
    if not isinstance(split, Mapping):
        return None
    if missing := [key for key in ("image", "label") if key not in split]:
        raise DataError(f"{name} has no {' and no '.join(missing)}; it has {', '.join(map(str, split)) or 'nothing'}")
    values = {str(key): np.asarray(value) for key, value in split.items()}
    sizes = {key: len(value) if value.ndim else 0 for key, value in values.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{name} has arrays of several lengths: {', '.join(f'{key} {size:,}' for key, size in sizes.items())}")
    images = with_channels(inputs(values.pop("image"), f"the images of {name}"), whole_split=True, name=name)
    labels = numbers(values.pop("label"), f"the labels of {name}")
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype == np.int32:
        labels = labels[:, 0]
    return Arrays(images, labels, {key: numbers(value, f"{key} of {name}") for key, value in values.items()})


def inputs(values: np.ndarray, name: str) -> np.ndarray:
    """Inputs as uint8 or float32.  Raises DataError for other kinds of numbers, and for those that are not finite."""
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"{name} are {values.dtype}; give uint8, from 0 to 255, or floating-point numbers")
    return _finite(values, name)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        single = values.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        raise DataError(f"{name} are not all finite numbers of 32 bits")
    return single


def with_channels(values: np.ndarray, *, whole_split: bool, name: str) -> np.ndarray:
    """Images with an axis for the channels, grey ones may lack it; vectors as they are."""
    axes = values.ndim - whole_split
    if axes not in (1, 2, 3) or 0 in values.shape[whole_split:]:
        raise DataError(
            f"{name} has inputs of shape {values.shape[whole_split:]}; expected (height, width, channels) or (features,)"
        )
    return values[..., None] if axes == 2 else values


def numbers(values: np.ndarray, name: str) -> np.ndarray:
    """Labels or other numbers: integers as int32; truth values and floating-point numbers, which are no classes, as float32."""
    if values.dtype == bool or np.issubdtype(values.dtype, np.floating):
        return _finite(values, name)
    if not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"{name} are {values.dtype}, not numbers")
    if values.size and not (int(values.min()) >= -(2**31) and int(values.max()) < 2**31):
        raise DataError(f"{name} are beyond 32 bits")
    return values.astype(np.int32)


class Items:
    """The examples of a split that are read by index, one at a time.

    Args:
      source: has `__len__` and `__getitem__`.
      name: what to call it in messages.
      channels: of images that are encoded or Pillow's.
      decoding: how images that are encoded are decoded.

    Raises:
      DataError: it does not say how many there are.
    """

    def __init__(self, source: Any, name: str, channels: int, decoding: Decoding):
        self._source, self.name = source, name
        try:
            self._size = len(source)
        except Exception as error:  # whatever somebody's source may raise, as one that streams does
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{name} does not say how many examples it has ({reason})") from error
        self._channels, self._decoding = channels, decoding
        self._lock = threading.Lock()  # not every source may be read by several threads at once

    def __len__(self) -> int:
        return self._size

    def read(self, index: int) -> Example:
        """An example; its image is encoded, or an array with an axis for the channels.

        Raises:
          DataError: it cannot be read, or is none.
        """
        name = f"{self.name}[{index}]"
        try:
            with self._lock:
                item = self._source[index]
        except Exception as error:  # whatever somebody's source may raise
            raise DataError(f"{name} cannot be read ({type(error).__name__}: {first_line(error)})") from error
        image, label, extras = _parts(item, name)
        others = {key: value for key, value in extras.items() if np.asarray(value).dtype.kind in "biuf"}
        others = {key: numbers(np.asarray(value), f"{key} of {name}") for key, value in {"label": label, **others}.items()}
        if others["label"].shape == (1,) and others["label"].dtype == np.int32:
            others["label"] = others["label"][0]
        return Example(self._image(image, name), others, name)

    def decoded(self, index: int) -> Example:
        """An example whose image is an array.  Raises DataError also if it cannot be decoded."""
        image, others, name = self.read(index)
        if isinstance(image, bytes):
            try:
                image = decode_whole(image, self._channels, self._decoding)
            except Undecodable as error:
                raise DataError(f"{name} cannot be decoded ({error})") from None
        return Example(image, others, name)

    def _image(self, image: Any, name: str) -> bytes | np.ndarray:
        if isinstance(image, Mapping) and image.get("bytes"):  # as Hugging Face's data sets have it
            image = image["bytes"]
        if isinstance(image, bytes):
            return image
        if isinstance(image, Image.Image):
            try:
                turned = orientation_of_image(image) if self._decoding.exif else UPRIGHT
                return np.ascontiguousarray(turned.upright(pixels(image, self._channels, self._decoding.alpha)))
            except Undecodable as error:
                raise DataError(f"{name} cannot be used: {error}") from None
        values = np.asarray(image)
        return with_channels(inputs(values, f"the values of {name}"), whole_split=False, name=name)


def _parts(item: Any, name: str) -> tuple[Any, Any, dict[str, Any]]:
    """The image, the label and the rest of an example."""
    if isinstance(item, Mapping):
        rest = dict(item)
        if missing := [key for key in ("image", "label") if key not in rest]:
            raise DataError(f"{name} has no {' and no '.join(missing)}; it has {', '.join(map(str, rest)) or 'nothing'}")
        return rest.pop("image"), rest.pop("label"), rest
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1], {}
    raise DataError(f"{name} is {shown(item)}; expected (image, label), or a mapping with image and label")


def check_deterministic(items: Items, indices: Sequence[int]) -> list[Example]:
    """Reads some examples twice.

    Raises:
      DataError: two readings of one differ, so that a run could not be resumed exactly.
    """
    first = [items.read(index) for index in indices]
    for one, index in zip(first, indices, strict=True):
        other = items.read(index)
        if what := _difference(one, other):
            raise DataError(
                f"{one.name} has another {what} each time it is read; give the same example for the same index, and leave"
                " augmentation to the config (dataset.flip, dataset.crop_padding, ...)"
            )
    return first


def _difference(one: Example, other: Example) -> str | None:
    fields = [("image", one.image, other.image)]
    fields += [(key, one.others.get(key), other.others.get(key)) for key in {**one.others, **other.others}]
    for name, mine, theirs in fields:
        if not np.array_equal(np.asarray(mine), np.asarray(theirs)):
            return name
    return None


def digest_of(parts: Mapping[str, Any]) -> str:
    """Of arrays, bytes and texts by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, part in parts.items():
        if hasattr(part, "dtype"):
            array = np.ascontiguousarray(part)
            kind, content = f"{array.dtype}{array.shape}", array.reshape(-1).view(np.uint8).data
        else:
            content = part if isinstance(part, bytes) else str(part).encode(errors="surrogateescape")
            kind = str(len(content))
        digest.update(f"{name}\0{kind}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def field_of(values: np.ndarray, *, whole_split: bool) -> Field:
    """What an array holds for each example."""
    return Field(tuple(int(side) for side in values.shape[whole_split:]), str(values.dtype))
