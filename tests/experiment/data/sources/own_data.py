"""Functions that a user could have written, named in tests as data sets."""

import itertools

import numpy as np
from PIL import Image

from lowrank_jax.experiment.data.own import Data

COUNTER = itertools.count()


def _draw(size, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, *shape), np.uint8), np.arange(size) % 3


def arrays(size=30, seed=0):
    return {"train": _draw(size, 6, 5, 2, seed=seed), "test": _draw(9, 6, 5, 2, seed=1)}


def vectors():
    draw = np.random.default_rng(0)
    return {split: (draw.normal(3, 2, (20, 7)), np.arange(20) % 4) for split in ("train", "test")}


def floats():
    return {split: (np.ones((8, 4, 4, 3), np.float64), np.arange(8) % 2) for split in ("train", "test")}


def targets():
    """Numbers to predict, and a field of one's own."""
    images, _ = _draw(12, 4, 4, 3)
    return {"train": {"image": images, "label": np.linspace(0, 1, 24).reshape(12, 2), "weight": np.arange(12)}}


def maps():
    images, _ = _draw(12, 4, 4, 3)
    return {"train": {"image": images, "label": images[..., 0] // 64}}


class Photographs:
    """Images of many sizes, by index."""

    def __init__(self, size, kind="array", offset=0):
        self.size, self.kind, self.offset = size, kind, offset

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        draw = np.random.default_rng([index, self.offset])
        values = draw.integers(0, 256, (20 + index % 5, 30 - index % 3, 3), np.uint8)
        image = Image.fromarray(values) if self.kind == "pillow" else values
        return {"image": image, "label": index % 2, "id": index, "caption": "not a number"}


def photographs(kind="array"):
    return Data({"train": Photographs(40, kind), "test": Photographs(10, kind, 1)}, class_names=["even", "odd"])


def listed():
    """Items of one size; a list of pairs."""
    images, labels = _draw(25, 6, 5)
    return Data({"train": [*zip(images, labels.tolist(), strict=True)]}, num_classes=3)


class Changing(Photographs):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "image": np.full((4, 4, 3), next(COUNTER) % 256, np.uint8)}


def changing():
    return Data({"train": Changing(5)}, num_classes=2)


class Failing(Photographs):
    def __getitem__(self, index):
        if index == 7:
            raise KeyError("no such file")
        return super().__getitem__(index)


def failing():
    return Data({"train": Failing(40)}, num_classes=2)


class Odd(Photographs):
    """One of its images is of another kind, which no sample shows."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        odd = {"float": item["image"] / 255.0, "grey": item["image"][..., :1], "label": item["image"]}
        return {**item, "image": odd[self.kind], "label": 9 if self.kind == "label" else 0} if index == 7 else item


def odd(kind):
    return Data({"train": Odd(40, kind)}, num_classes=2)


def broken():
    raise SystemExit("no")


class Streaming:
    """Has a length in name alone."""

    def __init__(self, size=None):
        self.size = size

    def __len__(self):
        if self.size is None:
            raise NotImplementedError("it streams")
        return self.size

    def __getitem__(self, index):
        return np.zeros((4, 4, 3), np.uint8), 0


def returning(what):
    images, labels = _draw(6, 4, 4, 3)
    return {
        "nothing": None,
        "number": 3,
        "no splits": {},
        "no label": {"train": {"image": images}},
        "lengths": {"train": (images, labels[:3])},
        "int64 images": {"train": (images.astype(np.int64), labels)},
        "nan": {"train": (np.full((6, 4), np.nan), labels)},
        "texts": {"train": (images, np.array(list("abcdef")))},
        "negative": {"train": (images, labels - 1)},
        "too large": Data({"train": (images, labels)}, num_classes=2),
        "names": Data({"train": (images, labels)}, num_classes=3, class_names=["a", "b"]),
        "other shapes": {"train": (images, labels), "test": (images[:, :3], labels)},
        "other types": {"train": (images, labels), "test": (images.astype(np.float32), labels)},
        "empty": {"train": (images, labels), "test": (images[:0], labels[:0])},
        "split name": {"the train": (images, labels)},
        "five axes": {"train": (images[None, None], labels[:1])},
        "items": Data({"train": [1, 2, 3]}, num_classes=2),
        "ids": {"train": (images, np.array([0, 1, 2, 3, 4, 1_900_000_000]))},
        "many classes": Data({"train": (images, labels)}, num_classes=10**9),
        "streaming": Data({"train": Streaming()}, num_classes=2),
        "a fraction": Data({"train": Streaming(80.0)}, num_classes=2),
        "unsaid classes": {"train": [(image, 0) for image in images]},
        "label of an item": Data({"train": [(image, 0) for image in images] + [(images[0], 0.5)]}, num_classes=2),
    }[what]


not_a_function = 3


def hugging_face(folder, encoded=False):
    import datasets  # pyright: ignore[reportMissingImports]

    splits = datasets.load_from_disk(folder)
    return splits.cast_column("image", datasets.Image(decode=False)) if encoded else splits


def grain_source():
    import grain

    images, labels = _draw(20, 6, 5, 3)
    source = grain.MapDataset.source([*zip(images, labels.tolist(), strict=True)]).map(lambda pair: (255 - pair[0], pair[1]))
    return Data({"train": source}, num_classes=3)
