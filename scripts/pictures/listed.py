"""The list of the pictures, and the rule that divides them into three sets."""

import csv
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

LIST = Path(__file__).with_name("list.csv")
CALIBRATION, HELD_OUT, EVALUATION = SETS = ("calibration", "held out", "evaluation")
_TURNS = (CALIBRATION, HELD_OUT, CALIBRATION, EVALUATION)


@dataclasses.dataclass(frozen=True, order=True)
class Picture:
    """A photograph in a package; a row of list.csv.

    Attributes:
      source: whose package it is, `debian` or `python`.
      package: the package's name, as one installs it.
      path: the file in the package: from / in Debian's, from site-packages in Python's.
      sha256: of the file's bytes, hexadecimal.
      series: what it shares with other pictures of the same scene, person or place; empty for most.
      set: one of `SETS`.
    """

    source: str
    package: str
    path: str
    sha256: str
    series: str
    set: str

    @property
    def name(self) -> str:
        return f"{self.package}/{self.path}"


def read_list(file: Path = LIST) -> list[Picture]:
    """All pictures, in the list's order."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [Picture(**row) for row in csv.DictReader(lines)]


def split(pictures: Iterable[Picture]) -> dict[Picture, str]:
    """The set of each picture, whatever set it names: half calibration, a quarter held out, a quarter evaluation.

    A package's series (a picture without one is its own) are ordered by the hashes of their names, and dealt out in turn, from
    where the hash of the package's name says.  So each package is in all sets if it can be, a series is in one, and other
    packages have no say in it.
    """
    sets: dict[Picture, str] = {}
    by_package = sorted(pictures, key=lambda picture: picture.package)
    for package, group in itertools.groupby(by_package, key=lambda picture: picture.package):
        members = list(group)
        series = sorted({picture.series or picture.name for picture in members}, key=_hashed)
        turn = {name: _TURNS[(_hashed(package)[0] + place) % len(_TURNS)] for place, name in enumerate(series)}
        sets |= {picture: turn[picture.series or picture.name] for picture in members}
    return sets


def _hashed(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
