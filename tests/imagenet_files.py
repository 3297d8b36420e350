"""Small archives in the layout of ImageNet's, of natural images that scikit-learn ships, and data prepared from them."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from lowrank_jax.data.prepare import prepare

WORDNET_IDS = ("n01440764", "n01443537", "n01484850", "n01491361")


def natural_images(count: int, *, side: int, seed: int = 0) -> list[Image.Image]:
    """Windows of random place and shape out of two photographs, scaled so that the longer side is about `side`."""
    photographs = load_sample_images().images
    draw = np.random.default_rng(seed)
    images = []
    for i in range(count):
        photograph = photographs[i % 2]
        height, width = (int(size * draw.uniform(0.6, 1.0)) for size in photograph.shape[:2])
        top, left = (
            int(draw.integers(0, size - part + 1)) for size, part in zip(photograph.shape, (height, width), strict=False)
        )
        window = Image.fromarray(photograph[top : top + height, left : left + width])
        scale = side / max(height, width)
        images.append(window.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS))
    return images


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_archives(
    folder: pathlib.Path, train: list[bytes], validation: list[bytes], *, truncate: tuple[str, ...] = ()
) -> None:
    """Writes ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.

    Args:
      train: images, dealt out to the classes of `WORDNET_IDS` in turn.
      validation: images; the builder knows their classes.
      truncate: the names of files that end in the middle.
    """

    def content(name: str, data: bytes) -> bytes:
        return data[: len(data) // 2] if name in truncate else data

    folder.mkdir(parents=True, exist_ok=True)
    archives = []
    for i, wordnet_id in enumerate(WORDNET_IDS):
        names = {f"{wordnet_id}_{j}.JPEG": data for j, data in enumerate(train[i :: len(WORDNET_IDS)])}
        archives.append((f"{wordnet_id}.tar", _tar({name: content(name, data) for name, data in names.items()})))
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(dict(archives)))
    names = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": data for i, data in enumerate(validation)}
    files = {name: content(name, data) for name, data in names.items()}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar(files))


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def prepare_small(
    folder: pathlib.Path, *, train: int, validation: int, side: int, truncate: tuple[str, ...] = ()
) -> pathlib.Path:
    """Runs TFDS's own builder on small archives; returns the data folder."""
    images = [jpeg(image) for image in natural_images(train + validation, side=side)]
    write_archives(folder / "archives", images[:train], images[train:], truncate=truncate)
    prepare("imagenet2012", folder / "archives", str(folder / "data"))
    return folder / "data"
