"""The folders of a run's checkpoints: which of them are steps, and whether this user may read them."""

import contextlib
import importlib
import os
import re

import orbax.checkpoint as ocp
from etils import epath

from lowrank_jax.experiment.errors import CheckpointError
from lowrank_jax.experiment.workdir import files

NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)
"""The name of a step's folder."""

_VANISHED = (FileNotFoundError, NotADirectoryError)  # what a run deletes while it is listed


def stored(directory: epath.Path) -> list[int]:
    """The steps that are there and complete; whatever else is in the folder is none, and some may be deleted meanwhile."""
    try:
        folders = [path for path in directory.iterdir() if NUMBER.fullmatch(path.name)]
    except _VANISHED:
        return []
    return sorted(int(path.name) for path in folders if _is_complete(path))


def links(directory: epath.Path) -> list[epath.Path]:
    """Symbolic links in the place of steps, which lead to another step or out of the folder."""
    return [path for path in directory.iterdir() if NUMBER.fullmatch(path.name) and files.is_link(path)]


def _is_complete(folder: epath.Path) -> bool:
    with contextlib.suppress(*_VANISHED):
        return folder.is_dir() and ocp.utils.is_checkpoint_finalized(folder)
    return False


def check_readable(folder: epath.Path) -> None:
    """Raises CheckpointError if this user may not read all of a local step: it need not be damaged."""
    if not files.is_local(folder):
        return
    for parent, folders, names in os.walk(folder):  # which passes over what is deleted meanwhile
        needed = {parent: os.R_OK | os.X_OK, **{f"{parent}/{name}": os.R_OK for name in (*folders, *names)}}
        for path, rights in needed.items():
            if not os.access(path, rights) and os.path.lexists(path):
                raise CheckpointError(f"{path}: this user needs permission to read it")


def absolute(path: epath.Path) -> epath.Path:
    """The path as orbax takes it.  Raises CheckpointError for a bucket whose package is missing."""
    if files.is_local(path):
        return path.resolve()
    if str(path).startswith("gs://"):
        try:
            importlib.import_module("google.cloud.storage")  # orbax asks it for the kind of the bucket
        except ImportError:
            raise CheckpointError(f"{path}: checkpoints there need pip install 'lowrank_jax[gcs]'") from None
    return path
