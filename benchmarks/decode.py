"""Images per CPU-second from prepared records to pixels, beside tf.data on the same records.

    python -m benchmarks.decode

JPEGs of 500 by 375 pixels or about that, cut from the photographs of scikit-learn and scikit-image, go through TFDS's own
builder.  Our training and evaluation batches and the same in tf.data (its fused decode_and_crop_jpeg, bilinear resizing, flip)
take turns on them in one process, at 224 by 224.  Time is that of the process on all of its cores.  tf.data reads the same
examples from a TFRecord file, one after the other, decodes with as many threads as there are cores, and draws its crops from
its own sampler with the same ranges of area and aspect ratio; ours are in ArrayRecord files and shuffled.

Our training takes libjpeg's fast transform and upsampling, our evaluation its exact ones; tf.data has its defaults.
INTEGER_FAST and no fancy upscaling made no material difference to tf.data in a check: 1464 against 1486 images per CPU-second.
The areas that the two samplers draw differ a little.
"""

import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.turns import per_cpu_second
from lowrank_jax.experiment.data import crops, datasets
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.pipeline import EvalBatches, Feed, TrainBatches
from lowrank_jax.experiment.data.prepare import prepare
from tests.imagenet_files import jpeg, natural_images, write_archives

IMAGES, BATCH, SIZE, TURNS = 1024, 128, 224, 7
AREA = (0.08, 1.0)


def our_training(split: datasets.Split) -> None:
    for _ in Feed(TrainBatches(split, BATCH, IMAGES // BATCH, 0, Augmentation(AREA, flip=True))):
        pass


def our_evaluation(split: datasets.Split) -> None:
    for _ in EvalBatches(split, BATCH):
        pass


def tf_data(records: str, crop: Callable[[Any, Any], Any]) -> Callable[[], None]:
    """A run through a TFRecord file in tf.data; `crop` maps the shape of an image to a box, and whether to flip."""
    import tensorflow as tf

    features = {"image": tf.io.FixedLenFeature((), tf.string), "label": tf.io.FixedLenFeature((), tf.int64)}

    def example(record: Any) -> tuple[Any, Any]:
        parsed = tf.io.parse_single_example(record, features)
        box, flip = crop(tf, tf.io.extract_jpeg_shape(parsed["image"]))
        image = tf.image.resize(tf.io.decode_and_crop_jpeg(parsed["image"], box, channels=3), (SIZE, SIZE))
        image = tf.image.random_flip_left_right(image) if flip else image
        return tf.cast(image, tf.uint8), parsed["label"]

    data = tf.data.TFRecordDataset(records).map(example, num_parallel_calls=os.cpu_count())
    data = data.batch(BATCH).prefetch(2)

    def run() -> None:
        for _ in data:
            pass

    return run


def random_box(tf: Any, shape: Any) -> tuple[Any, bool]:
    """tf.image's own sampler."""
    ranges = {"area_range": AREA, "aspect_ratio_range": crops.ASPECTS, "min_object_covered": 0.0, "max_attempts": 10}
    boxes = tf.zeros((0, 0, 4))
    begin, size, _ = tf.image.sample_distorted_bounding_box(shape, boxes, use_image_if_no_bounding_boxes=True, **ranges)
    return tf.concat([begin[:2], size[:2]], 0), True


def central_box(tf: Any, shape: Any) -> tuple[Any, bool]:
    """The square in the middle of seven eighths of the shorter side."""
    side = tf.cast(0.875 * tf.cast(tf.reduce_min(shape[:2]), tf.float32), tf.int32)
    begin = (shape[:2] - side) // 2
    return tf.concat([begin, [side, side]], 0), False


def write(folder: pathlib.Path) -> tuple[pathlib.Path, float]:
    """The data folder and the mean size of an image in bytes."""
    images = [jpeg(image, quality=95) for image in natural_images(IMAGES, side=500)]
    write_archives(folder / "archives", images, images[:1])
    prepare("imagenet2012", folder / "archives", str(folder / "data"))
    return folder / "data", float(np.mean([len(image) for image in images]))


def copy_records(data_dir: pathlib.Path, target: str) -> None:
    """The same examples as a TFRecord file."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder("imagenet2012", data_dir=str(data_dir), file_format="array_record")
    source = builder.as_data_source("train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    with tf.io.TFRecordWriter(target) as writer:
        for record in source:
            writer.write(record)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data_dir, size = write(pathlib.Path(folder))
        dataset = datasets.describe("imagenet2012", {"train_size": IMAGES, "validation_size": 1}, image_size=SIZE)
        split = datasets.load(dataset, "train", str(data_dir))
        records = str(data_dir / "train.tfrecord")
        copy_records(data_dir, records)
        rates = per_cpu_second(
            {
                "training": lambda: our_training(split),
                "tf.data training": tf_data(records, random_box),
                "evaluation": lambda: our_evaluation(split),
                "tf.data evaluation": tf_data(records, central_box),
            },
            TURNS,
            IMAGES,
        )
    print(f"{IMAGES} JPEGs of {size / 1000:.0f} kB on average, {SIZE}x{SIZE}, images per CPU-second; medians of {TURNS} turns")
    for name in ("training", "evaluation"):
        ours, theirs = rates[name], rates[f"tf.data {name}"]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"{name}: {statistics.median(ours):.0f}, tf.data {statistics.median(theirs):.0f}: ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
