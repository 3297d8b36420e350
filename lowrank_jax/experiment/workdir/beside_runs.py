"""The files that commands write into a folder of runs, beside their work directories."""

import pathlib
from collections.abc import Collection, Sequence

from lowrank_jax.experiment.workdir import files

_SWEEP = "sweep.json"
_PAGES = ("report.html", "report.md", "report.csv")
_PICTURES = ("curves.png", "_params.png", "_macs.png", "_speed.png")  # by how their names end


def runs_among(paths: Sequence[str], written: Collection[str | None] = ()) -> list[str]:
    """Paths such as those of `runs/sweep/*`, each once, without the files of ours among them; all, if nothing else is left.

    Args:
      paths: of work directories, supposedly.
      written: further files that are ours: what the command is about to write.
    """
    paths = list(dict.fromkeys(paths))
    ours = {pathlib.Path(path).absolute() for path in written if path}
    return [path for path in paths if not (files.is_local(path) and (_is_ours(path) or _is_file(path, ours)))] or paths


def _is_file(path: str, names: Collection[pathlib.Path]) -> bool:
    return pathlib.Path(path).absolute() in names and pathlib.Path(path).is_file()


def _is_ours(path: str) -> bool:
    """Whether a sweep or a report has written a file, by its name, and of a report's pictures by the page beside them."""
    file = pathlib.Path(path)
    if not file.is_file():
        return False
    return file.name in (_SWEEP, *_PAGES) or (file.name.endswith(_PICTURES) and file.with_name(_PAGES[0]).is_file())
