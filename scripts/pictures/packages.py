"""Gets files out of Debian's packages, without installing any, and out of installed Python packages."""

import hashlib
import importlib.resources
import itertools
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from lowrank_jax.text import one_line
from scripts.pictures.listed import Picture


class Missing(Exception):
    """A package cannot be had; the message says what to do."""


def fetch(
    pictures: Iterable[Picture], folder: Path, show: Callable[[str], None] = print
) -> tuple[dict[Picture, Path], list[str]]:
    """Copies the pictures into `folder`; packages are got one by one.

    Returns:
      Where each picture is that could be had, and what is missing: a line for each package or picture, with the reason.
    """
    found: dict[Picture, Path] = {}
    missing: list[str] = []
    for (source, package), group in itertools.groupby(sorted(pictures), key=lambda picture: (picture.source, picture.package)):
        wanted = {picture.path: picture for picture in group}
        try:
            files = (_of_debian if source == "debian" else _of_python)(package, set(wanted), folder)
        except Missing as error:
            missing.append(f"{package} ({len(wanted)} pictures): {error}")
            show(missing[-1])
            continue
        bad = [
            f"{wanted[path].name}: {_fault(path, wanted[path], files)}" for path in wanted if _fault(path, wanted[path], files)
        ]
        good = {picture: files[path] for path, picture in wanted.items() if not _fault(path, picture, files)}
        found |= good
        missing += bad
        show("\n".join([f"{package}: {len(good)} of {len(wanted)} pictures", *bad]))
    return found, missing


def _fault(path: str, picture: Picture, files: dict[str, Path]) -> str:
    """What is wrong with a picture's file; empty if nothing is."""
    if path not in files:
        return "not in this version of the package"
    if hashlib.sha256(files[path].read_bytes()).hexdigest() != picture.sha256:
        return "another picture in this version of the package (its sha256 differs)"
    return ""


def _of_debian(package: str, paths: set[str], folder: Path) -> dict[str, Path]:
    """Downloads a package into `folder`, copies the files out of it, and deletes it."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Missing(
            "needs apt-get and dpkg-deb: run this on Debian 12, which has all packages of the list, or in a container of it"
        )
    download = folder / "download"
    download.mkdir()
    try:
        got = subprocess.run(["apt-get", "download", package], cwd=download, capture_output=True, text=True, check=False)
        archives = list(download.glob("*.deb"))
        if got.returncode or not archives:
            said = next((line for line in got.stderr.splitlines() if line.startswith("E:")), "apt-get download failed")
            raise Missing(f"{one_line(said)}; `apt-get update` as root may help (Debian 12 has it)")
        return _unpacked(archives[0], paths, folder / package)
    finally:
        shutil.rmtree(download)


def _unpacked(archive: Path, paths: set[str], folder: Path) -> dict[str, Path]:
    """Copies files out of a Debian archive into `folder`; nothing else of it is written."""
    folder.mkdir()
    files: dict[str, Path] = {}
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as members:
                for member in members:
                    path = member.name.removeprefix("./")
                    content = members.extractfile(member) if path in paths and member.isfile() else None
                    if content is not None:
                        files[path] = _written(path, content.read(), folder, len(files))
        except tarfile.TarError as error:
            raise Missing("the package cannot be read") from error
        assert process.stdout is not None
        process.stdout.read()  # the archive's padding; dpkg-deb would complain of a closed pipe
    if process.returncode:
        raise Missing("the package cannot be read")
    return files


def _of_python(package: str, paths: set[str], folder: Path) -> dict[str, Path]:
    """Copies files out of an installed package into `folder`."""
    target = folder / package
    target.mkdir()
    files: dict[str, Path] = {}
    for path in sorted(paths):
        module, *inside = PurePosixPath(path).parts
        try:
            file = importlib.resources.files(module).joinpath(*inside)
        except ModuleNotFoundError as error:
            raise Missing(f"not installed: pip install {package}") from error
        if file.is_file():
            files[path] = _written(path, file.read_bytes(), target, len(files))
    return files


def _written(path: str, content: bytes, folder: Path, number: int) -> Path:
    """A file of its own name for the content: names in packages repeat."""
    target = folder / f"{number}{PurePosixPath(path).suffix}"
    target.write_bytes(content)
    return target
