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

_TAKEN_BY_ORBAX = re.compile(r"\d+\s*|.*\.orbax-checkpoint-tmp.*", re.DOTALL)
"""What orbax takes for a step, whatever `stored` says, or deletes as an unfinished one."""

_LARGEST_RECORD = 2**26  # bytes of a file that is read as JSON
_RECORDS = ("_CHECKPOINT_METADATA", "metadata", "_METADATA", "_sharding")

_VANISHED = (FileNotFoundError, NotADirectoryError)  # what a run deletes while it is listed


def stored(directory: epath.Path) -> list[int]:
    """The steps that are there and complete; whatever else is in the folder is none, and some may be deleted meanwhile."""
    try:
        folders = [path for path in directory.iterdir() if NUMBER.fullmatch(path.name)]
    except _VANISHED:
        return []
    return sorted(int(path.name) for path in folders if _is_complete(path))


def strangers(directory: epath.Path) -> dict[epath.Path, str]:
    """What lies in a local folder of checkpoints and would mislead or stop orbax when it lists them, and why."""
    reasons = {path: _strange(path) for path in directory.iterdir()} if files.is_local(directory) else {}
    return {path: reason for path, reason in reasons.items() if reason}


def _strange(path: epath.Path) -> str:
    if not _TAKEN_BY_ORBAX.fullmatch(path.name):
        return ""
    if files.is_link(path):
        return "it is a link"
    if not path.is_dir() or not path.name.strip().isdecimal():
        return ""
    if not NUMBER.fullmatch(path.name):
        return "its name is no step"
    return unreadable(path) or _damaged_metadata(path / "_CHECKPOINT_METADATA")


def unreadable(folder: epath.Path) -> str:
    """Why orbax, which opens whatever it finds, may not be given a local step: pipes block, and endless files have no end."""
    if not files.is_local(folder):
        return ""
    for parent, _, names in os.walk(folder):  # which passes over what is deleted meanwhile
        for name in names:
            with contextlib.suppress(*_VANISHED):
                status = pathlib.Path(parent, name).stat()
                if not stat.S_ISREG(status.st_mode):
                    return f"{name} is no plain file"
                if name in _RECORDS and status.st_size > _LARGEST_RECORD:
                    return f"{name} has {status.st_size:,} bytes"
    return ""


def _damaged_metadata(path: epath.Path) -> str:
    """Orbax reads this file of every step before it lists any, and passes over one that is no JSON."""
    try:
        metadata = files.read_json(path)
    except (OSError, ValueError):
        return ""
    types = {
        "item_handlers": dict | str,
        "metrics": dict,
        "performance_metrics": dict,
        "custom_metadata": dict,
    } | dict.fromkeys(("init_timestamp_nsecs", "commit_timestamp_nsecs"), int)
    right = isinstance(metadata, dict) and all(isinstance(metadata.get(name), kind | None) for name, kind in types.items())
    handlers = metadata.get("item_handlers") if right else None
    right = right and (not isinstance(handlers, dict) or all(isinstance(name, str) for name in handlers.values()))
    return "" if right else f"{path.name} is damaged"


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
