"""Images per CPU-second from a folder of JPEGs to the pixels of training, beside tf.data on the same folder.

    python -m benchmarks.folder

2,000 JPEGs of 500 by 375 pixels or about that, cut from the photographs of scikit-learn and scikit-image, in class folders.
`folder:PATH` and two programs of tf.data read, decode, crop at random, resize to 224 by 224 and mirror all of them, by turns in
one process; time is that of the process on all of its cores.  The first rival is Keras's image_dataset_from_directory, which
decodes every image whole and resizes it to 256 by 256, and tf.image's own sampler of boxes on that.  The second is written by
hand: it lists the files and decodes only the box (decode_and_crop_jpeg).  Both draw their boxes with our ranges of area and
aspect ratio, and decode with as many threads as there are cores.
"""

import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.decode import AREA, random_box
from benchmarks.turns import per_cpu_second
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.pipeline import Feed, TrainBatches
from tests.imagenet_files import jpeg, natural_images

IMAGES, CLASSES, BATCH, SIZE, WHOLE, TURNS = 2000, 5, 125, 224, 256, 5
OURS, KERAS, BY_HAND = "folder:", "image_dataset_from_directory", "decode_and_crop_jpeg"


def write(folder: pathlib.Path) -> None:
    """The images, dealt out to the classes."""
    for i, image in enumerate(natural_images(IMAGES, side=500)):
        kind = folder / f"class{i % CLASSES}"
        kind.mkdir(exist_ok=True)
        (kind / f"{i}.jpg").write_bytes(jpeg(image, quality=95))


def ours(folder: pathlib.Path) -> Callable[[], None]:
    """Batches of training as a run reads them."""
    dataset = datasets.describe(f"folder:{folder}", {"test_share": 0.0}, image_size=SIZE)
    split = datasets.load(dataset, "train", None)
    return lambda: _exhaust(Feed(TrainBatches(split, BATCH, IMAGES // BATCH, 0, Augmentation(AREA, flip=True))))


def keras(folder: pathlib.Path) -> Callable[[], None]:
    """`image_dataset_from_directory`, and random crops of what it gives."""
    import tensorflow as tf

    whole: Any = tf.keras.utils.image_dataset_from_directory(
        str(folder), image_size=(WHOLE, WHOLE), batch_size=None, shuffle=True, seed=0, verbose=False
    )

    def crop(image: Any, label: Any) -> tuple[Any, Any]:
        box, _ = random_box(tf, tf.shape(image))
        part = tf.image.crop_to_bounding_box(image, box[0], box[1], box[2], box[3])
        return tf.cast(tf.image.random_flip_left_right(tf.image.resize(part, (SIZE, SIZE))), tf.uint8), label

    data = whole.map(crop, num_parallel_calls=os.cpu_count()).batch(BATCH).prefetch(2)
    return lambda: _exhaust(data)


def by_hand(folder: pathlib.Path) -> Callable[[], None]:
    """Files in random order, of which only the box is decoded."""
    import tensorflow as tf

    def example(path: Any) -> Any:
        data = tf.io.read_file(path)
        box, _ = random_box(tf, tf.io.extract_jpeg_shape(data))
        image = tf.image.resize(tf.io.decode_and_crop_jpeg(data, box, channels=3), (SIZE, SIZE))
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8)

    files = tf.data.Dataset.list_files(f"{folder}/*/*.jpg", shuffle=True, seed=0)
    data = files.map(example, num_parallel_calls=os.cpu_count()).batch(BATCH).prefetch(2)
    return lambda: _exhaust(data)


def _exhaust(batches: Any) -> None:
    for _ in batches:
        pass


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder)
        rates = per_cpu_second({OURS: ours(folder), KERAS: keras(folder), BY_HAND: by_hand(folder)}, TURNS, IMAGES)
    print(f"{IMAGES} JPEGs in folders, random crops of {SIZE}x{SIZE}, images per CPU-second; medians of {TURNS} turns")
    print(f"{OURS} {statistics.median(rates[OURS]):.0f}")
    for rival in (KERAS, BY_HAND):
        ratio = statistics.median(a / b for a, b in zip(rates[OURS], rates[rival], strict=True))
        print(f"{rival} {statistics.median(rates[rival]):.0f}: ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
