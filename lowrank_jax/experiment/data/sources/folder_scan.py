"""Looks through a folder of images in class folders, once."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lowrank_jax.experiment.data import image_files
from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.data.progress import Progress
from lowrank_jax.experiment.data.statistics import one_sided
from lowrank_jax.text import one_line

_USUAL_SPLITS = {
    **dict.fromkeys(("train", "training", "training_set"), "train"),
    **dict.fromkeys(("test", "testing", "test_set"), "test"),
    **{name: name for name in ("val", "valid", "validation", "dev")},
}
"""Usual names of the folders of splits, in lower case, and what the split is called."""
_SHOWN = 3  # names in a message


@dataclasses.dataclass(frozen=True)
class Files:
    """The images of a split, in an order that mixes the classes and stays as it is when others are added.

    Attributes:
      paths: relative to the folder, with slashes.
      labels: of their classes, int32 `[size]`.
    """

    paths: tuple[str, ...]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scan:
    """What is in a folder.

    Attributes:
      root: the folder.
      class_names: in alphabetical order, which is the order of the labels.
      splits: the images of each, by its name.
      layered: the splits are folders; otherwise they are shares of one.
      skipped: names of what is left out, by the reason.
      digest: of the paths and sizes of all images.
      notes: what the user should know.
      times: when each folder that was looked into last changed.
    """

    root: str
    class_names: tuple[str, ...]
    splits: dict[str, Files]
    layered: bool
    skipped: dict[str, tuple[str, ...]]
    digest: str
    notes: tuple[str, ...]
    times: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """An image: its class, its path below the folder of classes, that folder's path below the root, and its size in bytes."""

    kind: str
    path: str
    base: str
    size: int

    @property
    def place(self) -> int:
        """A number of 64 bits that depends on the path alone."""
        return int.from_bytes(hashlib.blake2b(os.fsencode(self.path), digest_size=8).digest(), "big")


def scan(root: str, follow_links: bool, shares: tuple[tuple[str, float], ...]) -> Scan:
    """Looks through a folder.

    Args:
      root: the folder.
      follow_links: whether to look at what symbolic links lead to.
      shares: where classes lie in the folder itself, the splits besides `train` and their shares of the images.

    Raises:
      DataError: it is no folder, cannot be read, or holds no images in class folders.
    """
    walk = _Walk(root, follow_links)
    layered = walk.has_splits()
    if layered:
        files = {split: list(walk.images(folder)) for split, folder in walk.splits().items()}
    else:
        files = _by_share(list(walk.images("")), shares)
    files = {split: found for split, found in files.items() if found}
    names = tuple(sorted({file.kind for found in files.values() for file in found}, key=os.fsencode))
    if not names:
        raise DataError(
            f"{root} holds no images in class folders; expected CLASS/IMAGE, or SPLIT/CLASS/IMAGE with a folder train"
            f" ({', '.join(suffix[1:] for suffix in image_files.SUFFIXES)}){walk.summary('; ')}"
        )
    if len(names) == 1:
        raise DataError(f"{root} holds one class, {names[0]!r}; a network needs two to tell apart")
    splits = {split: _ordered(found, names) for split, found in sorted(files.items(), key=_train_first)}
    present = {split: {file.kind for file in found} for split, found in files.items()}
    notes = (*one_sided(present, names, names), *walk.notes())
    skipped = {reason: tuple(left) for reason, left in walk.skipped.items()}
    return Scan(root, names, splits, layered, skipped, _digest(files), notes, walk.times)


def changed(found: Scan) -> dict[str, int | None]:
    """When each folder of a scan last changed, by now; None where it is gone."""
    return {folder: _time(folder) for folder in found.times}


def _time(folder: str) -> int | None:
    try:
        return pathlib.Path(folder).stat().st_mtime_ns
    except OSError:
        return None


def _train_first(item: tuple[str, object]) -> tuple[bool, str]:
    return item[0] != "train", item[0]


def _by_share(files: Sequence[_File], shares: tuple[tuple[str, float], ...]) -> dict[str, list[_File]]:
    """Splits by the hash of each path: an image stays where it is when others are added."""
    ends = np.cumsum([share for _, share in shares])
    names = [*(name for name, _ in shares), "train"]
    found: dict[str, list[_File]] = {name: [] for name in names}
    for file in files:
        found[names[int(np.searchsorted(ends, file.place / 2**64, side="right"))]].append(file)
    return found


def _ordered(files: Sequence[_File], names: Sequence[str]) -> Files:
    label = {name: i for i, name in enumerate(names)}
    ordered = sorted(files, key=lambda file: (file.place, file.path))
    paths = tuple(f"{file.base}/{file.path}" if file.base else file.path for file in ordered)
    return Files(paths, np.array([label[file.kind] for file in ordered], np.int32))


def _digest(files: dict[str, list[_File]]) -> str:
    lines = sorted(
        b"%s\0%s\0%d\n" % (os.fsencode(split), os.fsencode(f.path), f.size) for split, fs in files.items() for f in fs
    )
    return hashlib.blake2b(b"".join(lines), digest_size=16).hexdigest()


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(one_line, names[:_SHOWN])) + (f" and {rest:,} more" if rest > 0 else "")


class _Walk:
    """Everything below a folder, with what is left out on the way.

    Args:
      root: the folder.
      follow_links: whether to look at what symbolic links lead to.

    Attributes:
      skipped: names of what was left out so far, by the reason.
      times: when each folder that was looked into last changed.
    """

    def __init__(self, root: str, follow_links: bool):
        self._root, self._follow = pathlib.Path(root), follow_links
        self.skipped: dict[str, list[str]] = {}
        self.times: dict[str, int] = {}
        self._told, self._seen = Progress(f"looking through {root}"), 0
        if not self._root.is_dir():
            what = "is not a folder" if self._root.exists() else "does not exist"
            raise DataError(f"{root} {what}")

    def has_splits(self) -> bool:
        """Whether the folders in the root are splits rather than classes: one has a split's name, and holds folders.

        Raises:
          DataError: they could be either.
        """
        folders = self.folders("")
        splits = [name for name in folders if name.lower() in _USUAL_SPLITS and self.folders(name)]
        others = [name for name in folders if name.lower() not in _USUAL_SPLITS]
        if splits and others and (mixed := [name for name in (*splits, *others) if self._has_images(name)]):
            raise DataError(
                f"{self._root}: is {one_line(splits[0])} a split or a class? It holds folders, as a split does, and"
                f" {one_line(mixed[0])} holds images, as a class does; move those images, or rename {one_line(splits[0])}"
            )
        return bool(splits)

    def _has_images(self, folder: str) -> bool:
        return any(image_files.is_image(entry.name) for entry in self._entries(folder))

    def splits(self) -> dict[str, str]:
        """The folders in the root, each of which is a split, by what the split is called."""
        found: dict[str, str] = {}
        for entry in self._entries(""):
            if self._left_out(entry, ""):
                continue
            if not entry.is_dir():
                self._leave_out("not in a class folder", entry.name)
                continue
            split = _USUAL_SPLITS.get(entry.name.lower(), entry.name)
            if split in found:
                raise DataError(f"{self._root}: {found[split]} and {entry.name} are both the split {split}; rename one")
            found[split] = entry.name
        return found

    def folders(self, inside: str) -> list[str]:
        """Names of the folders in one, without what is left out."""
        return [entry.name for entry in self._entries(inside) if self._reason(entry) is None and entry.is_dir()]

    def images(self, base: str) -> Iterator[_File]:
        """The images of the class folders in a folder, which itself is below the root."""
        for entry in self._entries(base):
            if self._left_out(entry, base):
                continue
            if not entry.is_dir():
                self._leave_out("not in a class folder", f"{base}/{entry.name}" if base else entry.name)
                continue
            before = self._seen
            kind = os.fsencode(entry.name).decode(errors="backslashreplace")
            yield from self._images_of(kind, base, entry.name, (_identity(entry),))
            if self._seen == before:
                self._leave_out("class folders without images", f"{base}/{entry.name}" if base else entry.name)

    def _images_of(self, kind: str, base: str, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[_File]:
        """The images of a class, in a folder of it; `above` are the folders that lead to it."""
        inside = f"{base}/{below}" if base else below
        for entry in self._entries(inside):
            if self._left_out(entry, inside):
                continue
            if entry.is_dir():
                identity = _identity(entry)
                if identity in above:
                    self._leave_out("links in a circle", f"{inside}/{entry.name}")
                    continue
                yield from self._images_of(kind, base, f"{below}/{entry.name}", (*above, identity))
                continue
            self._seen += 1
            self._told.at(self._seen)
            yield _File(kind, f"{below}/{entry.name}", base, entry.stat().st_size)

    def _left_out(self, entry: os.DirEntry[str], inside: str) -> bool:
        reason = self._reason(entry)
        if reason:
            self._leave_out(reason, f"{inside}/{entry.name}" if inside else entry.name)
        return reason is not None

    def _reason(self, entry: os.DirEntry[str]) -> str | None:
        """Why an entry is left out; None if it is not."""
        if entry.name.startswith("."):
            return "hidden"
        if entry.is_symlink() and not self._follow:
            return "symbolic links (dataset.kwargs.follow_links follows them)"
        if entry.is_dir():
            return None
        if not entry.is_file():
            return "broken links" if entry.is_symlink() else "not plain files"
        if not image_files.is_image(entry.name):
            return "not images"
        return None if entry.stat().st_size else "empty files"

    def _leave_out(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)

    def _entries(self, inside: str) -> list[os.DirEntry[str]]:
        folder = self._root / inside
        try:
            self.times[str(folder)] = folder.stat().st_mtime_ns
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror or error}") from None

    def summary(self, before: str) -> str:
        """What was left out, in one line after `before`; empty if nothing was."""
        parts = [f"{len(names):,} {reason} ({_listed(names)})" for reason, names in self.skipped.items()]
        return f"{before}left out: {', '.join(parts)}" if parts else ""

    def notes(self) -> list[str]:
        """The same as a note."""
        return [text] if (text := self.summary("")) else []


def _identity(entry: os.DirEntry[str]) -> tuple[int, int]:
    found = entry.stat()
    return found.st_dev, found.st_ino
