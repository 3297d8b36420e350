"""Makes images of real photographs, for measuring what compression does to a trained network.

    python -m scripts.pictures --out=FOLDER              # 16 random crops of each photograph, 224 pixels
    python -m scripts.pictures --out=FOLDER --whole      # one image of each: the middle of the whole photograph

The photographs are in packages of Debian 12, which are downloaded into a temporary folder and not installed (apt-get and
dpkg-deb; no root), and in scikit-image, scikit-learn and matplotlib.  What cannot be had is left out and named.  list.csv
beside this file names every photograph, its sha256 and its set: calibration, held out or evaluation.  Writes an .npz for each
set; `scripts.pictures.load` reads them.  A minute, 350 MB of downloads, 450 MB of files.
"""

import argparse
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from lowrank_jax.experiment.errors import BAD_INPUT, UserError
from lowrank_jax.text import align
from scripts.pictures.crops import central_crop, fingerprint, likeness, opened, random_crops
from scripts.pictures.listed import SETS, Picture, read_list
from scripts.pictures.packages import fetch
from scripts.pictures.stored import Pictures, save

ALIKE = 0.96
"""Two pictures are copies of each other if their likeness is above this."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    try:
        make(args.out, {"crops": args.crops, "size": args.size, "seed": args.seed, "whole": args.whole}, read_list())
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)


def make(out: Path, how: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Gets the pictures, cuts them, and writes the three sets into `out`.

    Raises:
      UserError: the folder cannot be written, a set would be empty, or a picture is in two sets.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be a folder: {error.strerror}") from error
    with tempfile.TemporaryDirectory(prefix="pictures-") as scratch:
        found, missing = fetch(pictures, Path(scratch))
        empty = [name for name in SETS if not any(picture.set == name for picture in found)]
        if empty:
            raise UserError("\n".join([f"no picture for {', '.join(empty)}; nothing was written. Missing:", *missing]))
        made = {**how, "pictures": len(found), "pillow": PIL.__version__, "numpy": np.__version__}
        names = np.array([picture.name for picture in pictures])
        prints: dict[Picture, np.ndarray] = {}
        for name in SETS:
            images, numbers = _cut(name, pictures, found, how, prints)
            _refuse_copies(prints)
            save(out, name, Pictures(images, numbers, names, made))
    print(_totals(list(found), how, missing))


def _cut(
    name: str,
    pictures: Sequence[Picture],
    found: Mapping[Picture, Path],
    how: Mapping[str, Any],
    prints: dict[Picture, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The images of one set `[n, size, size, 3]` and the numbers of their pictures `[n]`; notes the pictures' fingerprints."""
    some = [(number, picture) for number, picture in enumerate(pictures) if picture in found and picture.set == name]
    each = 1 if how["whole"] else how["crops"]
    images = np.empty((each * len(some), how["size"], how["size"], 3), np.uint8)
    for place, (_, picture) in enumerate(some):
        image = opened(found[picture])
        prints[picture] = fingerprint(image)
        images[each * place : each * (place + 1)] = _images(image, picture.name, how)
        _progress(name, place + 1, len(some))
    return images, np.repeat(np.array([number for number, _ in some], np.int32), each)


def _images(image: Any, name: str, how: Mapping[str, Any]) -> np.ndarray:
    if how["whole"]:
        return central_crop(image, how["size"])
    return random_crops(image, name, how["crops"], how["size"], how["seed"])


def copies(prints: Mapping[Picture, np.ndarray]) -> list[tuple[Picture, Picture]]:
    """The pairs of pictures that look alike and are not said to be of one series."""
    pairs = itertools.combinations(prints, 2)
    return [(a, b) for a, b in pairs if likeness(prints[a], prints[b]) > ALIKE and not (a.series and a.series == b.series)]


def _refuse_copies(prints: Mapping[Picture, np.ndarray]) -> None:
    if found := copies(prints):
        lines = [f"{a.name} ({a.set}) and {b.name} ({b.set})" for a, b in found]
        raise UserError("\n".join(["these look alike: remove one of the list, or give them a series:", *lines]))


def _progress(name: str, done: int, total: int) -> None:
    if sys.stdout.isatty() or done == total:
        print(f"\r{name}: {done} of {total} pictures", end="\n" if done == total else "", flush=True)


def _totals(found: list[Picture], how: Mapping[str, Any], missing: list[str]) -> str:
    """A table of packages and sets, and what is missing."""
    counts = Counter((picture.package, picture.set) for picture in found)
    packages = sorted({picture.package for picture in found})
    rows = [["package", *SETS], *([package, *(str(counts[package, name]) for name in SETS)] for package in packages)]
    sums = [sum(counts[package, name] for package in packages) for name in SETS]
    a_picture = 1 if how["whole"] else how["crops"]
    rows += [["pictures", *map(str, sums)], ["images", *(str(a_picture * n) for n in sums)]]
    left_out = (
        ["", "Left out, so what is measured on these is not comparable with the whole list:", *missing] if missing else []
    )
    return "\n".join(["", align(rows), *left_out])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for the three files")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--crops", type=int, default=16, help="random crops of each picture (16)")
    what.add_argument("--whole", action="store_true", help="one image of each picture: the largest square in its middle")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (224)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (0)")
    args = parser.parse_args(argv)
    low = [
        f"--{name}={getattr(args, name)} is below {least}"
        for name, least in (("crops", 1), ("size", 1), ("seed", 0))
        if getattr(args, name) < least
    ]
    if low:
        parser.error("; ".join(low))
    return args


if __name__ == "__main__":
    main()
