"""The TFDS builder of the embedded data set: 1,797 handwritten digits, 8 x 8, that scikit-learn ships."""

import numpy as np
import tensorflow_datasets as tfds

NUM_TEST = 360


class Builder(tfds.core.GeneratorBasedBuilder):
    """Digits, split once and for all into 1,437 to train on and 360 to test on."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Handwritten digits of 8x8 pixels, from the UCI repository as scikit-learn ships them.",
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)  # [1797, 64], from 0 to 16
        images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        # The file goes through its writers one after the other, so the test set is drawn from all of it.
        order = np.random.default_rng(0).permutation(len(images))
        parts = {"test": order[:NUM_TEST], "train": order[NUM_TEST:]}
        return {split: self._generate_examples(images[i], labels[i]) for split, i in parts.items()}

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}
