"""The files of crops: one for each set."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.pictures.listed import SETS


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images of one set.

    Attributes:
      images: uint8 `[n, size, size, 3]`.
      picture: the photograph that each was cut from, by its place in the list: int32 `[n]`, ascending.
      names: package and path of each photograph in the list; those of the images are `names[picture]`.
      made: what made them: crops, size, seed, versions.
    """

    images: np.ndarray
    picture: np.ndarray
    names: np.ndarray
    made: Mapping[str, Any]


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.npz"


def save(folder: Path, name: str, pictures: Pictures) -> None:
    """Writes one set; a file under its own name is whole."""
    file = file_of(folder, name)
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as stream:
        arrays = {field: getattr(pictures, field) for field in ("images", "picture", "names")}
        np.savez(stream, **arrays, made=np.array(json.dumps(dict(pictures.made), sort_keys=True)))
    partial.replace(file)


def load(folder: str | os.PathLike[str]) -> dict[str, Pictures]:
    """The images that `python -m scripts.pictures --out=FOLDER` made.

    Returns:
      For each of `calibration`, `held out` and `evaluation` its images; no photograph is in two of them.

    Raises:
      ValueError: a file is missing or cannot be read, or they were not made together; all problems are listed.
    """
    found: dict[str, Pictures] = {}
    problems = []
    for name in SETS:
        try:
            found[name] = _read(file_of(Path(folder), name))
        except FileNotFoundError:
            problems.append(f"{file_of(Path(folder), name)} does not exist")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            problems.append(f"{file_of(Path(folder), name)} is not a file of crops")
    if len({json.dumps(dict(pictures.made), sort_keys=True) for pictures in found.values()}) > 1:
        problems.append("the files were made by different commands")
    if problems:
        raise ValueError(f"{'; '.join(problems)}: make them with `python -m scripts.pictures --out={os.fspath(folder)}`")
    return found


def _read(file: Path) -> Pictures:
    with np.load(file, allow_pickle=False) as arrays:
        return Pictures(arrays["images"], arrays["picture"], arrays["names"], json.loads(str(arrays["made"])))
