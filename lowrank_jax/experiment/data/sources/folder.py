"""`folder:PATH`: images in class folders."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from lowrank_jax.experiment.data import pillow
from lowrank_jax.experiment.data.arrays import check_memory
from lowrank_jax.experiment.data.base import DataError, Dataset, Decoding, Request, Source, Split, one_of
from lowrank_jax.experiment.data.encoded import EncodedImages, Example, read_whole
from lowrank_jax.experiment.data.kept import Kept
from lowrank_jax.experiment.data.orientation import UPRIGHT, orientation_of_image
from lowrank_jax.experiment.data.progress import Progress
from lowrank_jax.experiment.data.sources.folder_scan import Scan, changed, scan
from lowrank_jax.experiment.data.splits import split_parts
from lowrank_jax.text import count

DEFAULT_SIZE = 224
"""The side at which images of many sizes are read, unless `dataset.image_size` says otherwise."""

SMALL_SIDE = 96  # pixels; larger images are seldom all of one size by nature
SMALL_TOTAL = 2 * 2**30  # bytes of all images; the same on every machine, as what a run does must not depend on it


def _share(default: float) -> float:
    def check(value: float) -> str | None:
        return None if 0 <= value < 1 else "must be at least 0 and less than 1"

    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """The legal `dataset.kwargs` of a folder of images.

    Attributes:
      channels: 3 for RGB, 1 for grey.
      exif: images are turned as their EXIF orientation says; False takes them as they are stored, as torchvision does.
      alpha: what shows through transparent pixels: "white", "black", or "drop" for the colours stored there, as in torchvision.
      follow_links: symbolic links are followed, wherever they lead; by default they are left out and counted.
      test_share, valid_share: of a folder of classes without splits: the shares of images for the splits `test` and `valid`,
        chosen by a hash of each path, so that an image keeps its split when others are added.
      in_memory: images are decoded once, whole, and kept in memory; all must have one size.  By default if they have, and are
        small.
    """

    channels: int = one_of(3, 1)
    exif: bool = True
    alpha: str = one_of("white", "black", "drop")
    follow_links: bool = False
    test_share: float = _share(0.1)
    valid_share: float = _share(0.0)
    in_memory: bool | None = None


def source(path: str, name: str) -> Source:
    """The images in a folder; `name` is what the config calls them."""

    def describe(options: FolderOptions, request: Request) -> Dataset:
        refuse_remote(path, request)
        return _describe(
            name, str(pathlib.Path(request.data_dir or "").expanduser() / pathlib.Path(path).expanduser()), options, request
        )

    return Source(describe, _load, FolderOptions)


def refuse_remote(path: str, request: Request) -> None:
    """Raises DataError for a path in a bucket."""
    for place in (path, request.data_dir or ""):
        if "://" in place:
            raise DataError(f"{place} is not on this machine; copy it, or mount it")


_scan = Kept(scan, changed)


def _found(root: str, options: FolderOptions) -> Scan:
    shares = tuple((name, share) for name, share in (("test", options.test_share), ("valid", options.valid_share)) if share)
    return _scan(root, options.follow_links, shares)


def _describe(name: str, root: str, options: FolderOptions, request: Request) -> Dataset:
    if options.test_share + options.valid_share >= 1:
        raise DataError(
            "dataset.kwargs.test_share and valid_share leave nothing to train on; together they must be less than 1"
        )
    found = _found(root, options)
    usual = FolderOptions()
    if found.layered and (options.test_share, options.valid_share) != (usual.test_share, usual.valid_share):
        raise DataError(
            f"{root} has folders for its splits ({', '.join(found.splits)}); remove test_share and"
            " valid_share from dataset.kwargs"
        )
    size = None if request.image_size and not options.in_memory else _size_in_memory(root, options)
    height, width = size or (DEFAULT_SIZE, DEFAULT_SIZE)
    sizes = {split: len(files.paths) for split, files in found.splits.items()}
    return Dataset(
        name,
        (height, width, options.channels),
        len(found.class_names),
        sizes,
        (),
        (),
        decoding=Decoding(exif=options.exif, alpha=options.alpha),
        whole=size is not None,
        classes=classes_of(found.class_names),
        class_names=found.class_names,
        digest=found.digest,
        origin=(root, options),
        notes=(*found.notes, _how_read(sum(sizes.values()), size, options.channels)),
        skipped={reason: len(names) for reason, names in found.skipped.items()},
    )


def _how_read(images: int, size: tuple[int, int] | None, channels: int) -> str:
    if size is None:
        return f"its {images:,} images are read from disk as they are needed, and cropped to one size"
    height, width = size
    return f"its {images:,} images of {height}x{width} are kept in memory, {count(images * height * width * channels)}B"


def classes_of(names: Sequence[str]) -> str:
    """A short text that is the same for the same classes alone."""
    listed = ", ".join(names)
    if len(listed) <= 60:
        return listed
    return f"{names[0]}, {names[1]}, ... {hashlib.sha256(listed.encode(errors='surrogateescape')).hexdigest()[:8]}"


def _size_in_memory(root: str, options: FolderOptions) -> tuple[int, int] | None:
    """The one size of the images, if they are to be kept in memory; None if they are not."""
    if options.in_memory is False:
        return None
    return _one_size(root, options, _found(root, options).digest)


def _find_one_size(root: str, options: FolderOptions, digest: str) -> tuple[int, int] | None:
    """Looks at the headers of the images, until it is known whether they have one size and are small enough.

    `digest` is that of the folder's content, by which the result is kept.
    """
    del digest
    paths = [path for files in _found(root, options).splits.values() for path in files.paths]
    told, first = Progress("looking at the sizes of images", len(paths)), None
    for i, path in enumerate(paths):
        told.at(i)
        size = _stored_size(f"{root}/{path}", options.exif)
        if size is None:  # it will be named when it is read
            continue
        first = first or (size, path)
        if size != first[0] and options.in_memory:
            (height, width), other = first
            raise DataError(
                f"dataset.kwargs.in_memory: {path} has {size[0]}x{size[1]} pixels, and {other} {height}x{width};"
                " images that are kept in memory must have one size"
            )
        height, width = size
        large = max(size) > SMALL_SIDE or len(paths) * height * width * options.channels > SMALL_TOTAL
        if size != first[0] or (large and not options.in_memory):
            return None
    return first and first[0]


_one_size = Kept(_find_one_size, lambda found: None)


def _stored_size(path: str, exif: bool) -> tuple[int, int] | None:
    """Height and width of an image, upright if `exif`; None if its header cannot be read."""
    try:
        with pillow.opened(path) as image:
            turned = orientation_of_image(image) if exif else UPRIGHT
            return turned.size(image.height, image.width)
    except Exception:  # every format has its own errors
        return None


class _FolderImages:
    """The images of a split, read from their files by index."""

    def __init__(self, root: str, paths: Sequence[str], labels: Sequence[int]):
        self._root, self._paths, self._labels = root, paths, labels

    def __len__(self) -> int:
        return len(self._paths)

    def labels(self) -> np.ndarray:
        """Of all images, int32 `[size]`."""
        return np.array(self._labels, np.int32)

    def __getitem__(self, index: int) -> Example:
        path = self._paths[index]
        try:
            with open(f"{self._root}/{path}", "rb") as file:  # noqa: PTH123 - a third of the time of pathlib's
                return Example(file.read(), {"label": self._labels[index]}, path)
        except OSError as error:
            raise DataError(
                f"{self._root}/{path} cannot be read ({error.strerror or error}); it was there when the folder was"
                " looked through"
            ) from error


def _load(dataset: Dataset, split: str, data_dir: str | None) -> Split:
    del data_dir  # it is part of the root
    root, options = dataset.origin
    found = _found(root, options)
    if found.digest != dataset.digest:
        raise DataError(f"{root} has changed since the config was read; start again")
    paths: list[str] = []
    labels: list[int] = []
    for name, start, stop in split_parts(dataset, split):
        files = found.splits[name]
        paths += files.paths[start:stop]
        labels += files.labels[start:stop].tolist()
    encoded = EncodedImages(dataset, split, _FolderImages(root, paths, labels), "mend or remove these files")
    if not dataset.whole:
        return encoded
    check_memory(dataset, f"{dataset.name}/{split}", len(paths))
    return read_whole(encoded, f"{dataset.name}/{split}", len(paths))
