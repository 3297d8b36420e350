"""TFDS builders as a user would write them."""

import numpy as np
import tensorflow_datasets as tfds


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Small pictures of one size, with other names for their parts."""

    VERSION = tfds.core.Version("1.0.0")
    SIDES = (10, 12)

    def _info(self):
        features = {
            "picture": tfds.features.Image(shape=(*self.SIDES, 3), encoding_format="png"),
            "kind": tfds.features.ClassLabel(names=["round", "square", "flat"]),
            "size": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "count": tfds.features.Scalar(dtype=np.int64),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30, 0), "test": self._generate_examples(9, 1)}

    def _generate_examples(self, count, seed):
        draw = np.random.default_rng(seed)
        for i in range(count):
            yield i, self.example(draw, i)

    def example(self, draw, i):
        picture = draw.integers(0, 256, (*self.SIDES, 3), np.uint8)
        return {"picture": picture, "kind": i % 3, "size": [i, 0.5], "count": i}


class Photographs(Shapes):
    """The same in many sizes."""

    SIDES = (None, None)

    def example(self, draw, i):
        picture = draw.integers(0, 256, (20 + i, 40 - i, 3), np.uint8)
        return {"picture": picture, "kind": i % 3, "size": [i, 0.5], "count": i}


class Failing(Shapes):
    def example(self, draw, i):
        raise KeyError("no such file")
