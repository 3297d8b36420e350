"""The folders of a run's checkpoints: which of them are steps, and whether this user may read them."""

import contextlib
import importlib
import os
import pathlib
import re
import stat

import orbax.checkpoint as ocp
from etils import epath

from lowrank_jax.experiment.errors import CheckpointError
from lowrank_jax.experiment.workdir import files

NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)
"""The name of a step's folder."""

_UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a step that is being written."""

_LARGEST_RECORD = 2**26  # bytes of a file that is read as a whole
_RECORDS = ("_CHECKPOINT_METADATA", "metadata", "_METADATA", "_sharding", "manifest.ocdbt")

_VANISHED = (FileNotFoundError, NotADirectoryError)  # what a run deletes while it is listed


def stored(directory: epath.Path) -> list[int]:
    """The steps that are there and complete; whatever else is in the folder is none, and some may be deleted meanwhile."""
    try:
        folders = [path for path in directory.iterdir() if NUMBER.fullmatch(path.name)]
    except _VANISHED:
        return []
    return sorted(int(path.name) for path in folders if _is_complete(path))


def strangers(directory: epath.Path) -> dict[epath.Path, str]:
    """What is in the place of a step and is none, by path: links, pipes, files."""
    reasons = {path: _strange(path) for path in directory.iterdir() if NUMBER.fullmatch(path.name) or _UNFINISHED in path.name}
    return {path: reason for path, reason in reasons.items() if reason}


def _strange(path: epath.Path) -> str:
    if files.is_link(path):
        return "it is a link"
    return "" if path.is_dir() else "it is no folder"


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """Steps that a process which was killed had begun to write."""
    return [path for path in directory.iterdir() if _UNFINISHED in path.name and path.is_dir()]


def unreadable(folder: epath.Path) -> str:
    """Why orbax, which opens whatever it finds, may not be given a local step: links lead out, pipes block; "" if it may."""
    if not files.is_local(folder):
        return ""
    for parent, folders, names in os.walk(folder):  # which passes over what is deleted meanwhile
        if linked := [name for name in (*folders, *names) if os.path.islink(os.path.join(parent, name))]:  # noqa: PTH114, PTH118
            return f"{linked[0]} is a link"
        for name in names:
            with contextlib.suppress(*_VANISHED):
                status = pathlib.Path(parent, name).stat()
                if not stat.S_ISREG(status.st_mode):
                    return f"{name} is no plain file"
                if name in _RECORDS and status.st_size > _LARGEST_RECORD:
                    return f"{name} has {status.st_size:,} bytes"
    return ""


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
