"""The files of a work directory other than checkpoints and event files."""

import contextlib
import errno
import fnmatch
import json
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import filelock
from etils import epath
from upath import UPath

from lowrank_jax.experiment.errors import InUse, WorkdirError
from lowrank_jax.experiment.workdir import files
from lowrank_jax.experiment.workdir.checked_json import with_check, without_check
from lowrank_jax.experiment.workdir.identity import defaults, differences, differing_keys, flatten
from lowrank_jax.experiment.workdir.metrics import Metrics
from lowrank_jax.text import first_line

RANKS = "ranks.json"
"""The ranks that a budget chose."""

WEIGHTS = "weights.json"
"""The trained weights that a run began with."""

_ALWAYS_CHECKED = (RANKS, WEIGHTS)  # all other files were once written without a checksum

# Without these a config.json belongs to something else.
_REQUIRED = {"seed", "dataset.name", "model.name", "lowrank.method"}
_LENGTH = {"steps", "epochs", "extensions"}
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what a file system without locks answers
_EPATH = ("gs://", "s3://", "az://", "hf://")
_WRITTEN = ("checkpoints", "damaged", "plugins", "log.txt")  # by whatever would follow a link


class Workdir:
    """The folder of one experiment, local or remote.

    Args:
      path: the folder.
      active: whether to write anything; in a run of several processes only the first one does.

    Raises:
      WorkdirError: the path is a URL that nothing here can open.
    """

    def __init__(self, path: epath.PathLike, *, active: bool = True):
        self._active = active
        # Training writes where epath can; reports are also read from other places that fsspec supports.
        other = re.match(r"[a-z0-9+]+://", str(path)) and not str(path).startswith(_EPATH)
        if re.fullmatch(r"[a-z0-9+]+://+", str(path)):
            raise WorkdirError(f"{path} does not name a folder")
        try:
            self.path: Any = UPath(str(path)) if other else epath.Path(path)
        except (ValueError, ImportError) as error:  # an unknown scheme, or its package is missing
            raise WorkdirError(f"{path}: {first_line(error)}") from None

    @property
    def metrics(self) -> Metrics:
        return Metrics(self.path / "metrics.jsonl", active=self._active)

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    def claim(self, config: dict[str, Any], earlier: Sequence[dict[str, Any]] = ()) -> None:
        """Claims the folder for this experiment, or for one that extends its own; see `check`.

        Raises:
          WorkdirError: it belongs to another experiment, or cannot be written.
        """
        if not self._active:
            return
        self.check(config, earlier)
        with self._writing():
            files.make_folder(self.path)
            self.write_json("config.json", config, checked=False)  # each checkpoint has its digest

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises WorkdirError if the folder cannot be written."""
        try:
            yield
        except OSError as error:
            raise WorkdirError(f"cannot write to {self.path}: {error.strerror or error}") from None

    def check_bucket(self) -> None:
        """Raises WorkdirError for a bucket that cannot be reached; TensorFlow would retry for ever."""
        match = re.match(r"[a-z0-9+]+://[^/]*", str(self.path))
        if not match:
            return
        try:
            there = epath.Path(match[0]).exists()
        except Exception as error:  # every kind of bucket has its own errors
            raise WorkdirError(f"cannot reach {match[0]}: {first_line(error)}") from error
        if not there:
            raise WorkdirError(f"there is no bucket {match[0]}, or this account has no access to it")

    def check_reachable(self) -> None:
        """The same where a folder is only read; reports also read from places that have no buckets."""
        if str(self.path).startswith(_EPATH):
            self.check_bucket()

    def check_path(self) -> None:
        """Raises WorkdirError for a path where orbax loses what it saves, links out of the folder, and a log that is none."""
        if not files.is_local(self.path):
            return
        whole = self.path.resolve()
        if any("\\" in part or "**" in part or not fnmatch.fnmatchcase(part, part) for part in whole.parts):
            raise WorkdirError(
                f"{whole}: no checkpoint can be saved where a folder has [...], ** or a backslash in its name; use another path"
            )
        for name in _WRITTEN:
            self.check_own(name)
        log = pathlib.Path(self.path, "log.txt")
        if log.exists() and not log.is_file():  # a pipe would block for ever
            raise WorkdirError(f"{log} is not a plain file, and a run's log goes there; remove it")

    def check_own(self, name: str) -> None:
        """Raises WorkdirError if a folder or file below this one, which need not exist, is a link; remote ones are none."""
        if files.is_link(link := self.path / name):
            raise WorkdirError(f"{link} is a link, and nothing is written through links; put what it leads to in its place")

    def check_folder(self, name: str) -> None:
        """The same of a folder, which may not be a file either."""
        self.check_own(name)
        if files.is_local(self.path) and (path := pathlib.Path(self.path, name)).exists() and not path.is_dir():
            raise WorkdirError(f"{path} is a file in the place of a folder; remove it")

    @contextlib.contextmanager
    def locked(self, seconds: float = 10.0, *, name: str = ".lock", doing: str = "training in") -> Iterator[None]:
        """Keeps other processes of this machine from doing the same with the folder; `doing` is what to call it.

        Does nothing if the folder is remote or its file system has no locks.  A process that is killed frees its lock.

        Raises:
          InUse: another process still holds the lock after so many seconds, which one that is ending may need.
          WorkdirError: the folder cannot be written.
        """
        if not files.is_local(self.path) or not self._active:
            yield
            return
        with self._writing():
            files.make_folder(self.path)
        lock = contextlib.ExitStack()
        held = filelock.FileLock(str(self.path / name), timeout=seconds, poll_interval=0.1, fallback_to_soft=False)
        try:
            lock.enter_context(held.acquire())
        except filelock.Timeout:
            raise InUse(f"another process is {doing} {self.path}; stop it, or use a new --workdir") from None
        except NotImplementedError:
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with lock:
            yield

    def check(self, config: dict[str, Any], earlier: Sequence[dict[str, Any]] = ()) -> None:
        """Raises WorkdirError if the folder belongs to another experiment, or cannot be trained in.

        Args:
          config: the experiment.
          earlier: those that it extends, whose folder it may take over.
        """
        self.check_bucket()
        self.check_path()
        if self.path.exists() and not self.path.is_dir():
            raise WorkdirError(f"{self.path} is a file; --workdir must name a folder")
        stored = self.path / "config.json"
        if stored.exists():
            found = self.read_config()
            differing = differences(found, config)
            if differing and all(differences(found, other) for other in earlier):
                raise WorkdirError(
                    f"{self.path} belongs to another experiment: {'; '.join(differing)}. {_advice(found, config)}"
                )

    def check_shared(self) -> None:
        """Raises WorkdirError if this is not the folder that process 0 has claimed."""
        if not (self.path / "config.json").exists():
            raise WorkdirError(
                f"{self.path} is not the folder that process 0 writes to: all processes need the same --workdir, on a shared"
                " file system or in a bucket"
            )

    def read_config(self) -> dict[str, Any]:
        """The config of the experiment; settings that were added since it was written have their defaults.

        Raises:
          WorkdirError: there is none, it does not belong to an experiment, or it is in a bucket out of reach.
        """
        self.check_reachable()
        config = self.read_json("config.json")
        if config is None:
            raise WorkdirError(f"{self.path} is not a work directory: it has no config.json")
        usual = defaults()
        sections = {key: value for key, value in usual.items() if isinstance(value, dict)}
        if not all(isinstance(config.get(key, {}), dict) for key in sections) or not flatten(config).keys() >= _REQUIRED:
            raise WorkdirError(f"{self.path}/config.json is not the config of an experiment")
        return {**usual, **config, **{key: {**value, **config.get(key, {})} for key, value in sections.items()}}

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file; None if there is no such file.

        Raises:
          WorkdirError: it is damaged, or its checksum is gone, which files of some names always had.
        """
        try:
            value = files.read_json(self.path / name)
            if not isinstance(value, dict):
                raise ValueError("it is not an object")
            return without_check(value, required=name in _ALWAYS_CHECKED)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise WorkdirError(f"{self.path}/{name} is damaged: {error}") from None

    def write_json(self, name: str, value: dict[str, Any], *, checked: bool = True) -> None:
        """Writes a JSON object, by default with a checksum: a figure that changes later is noticed when it is read."""
        self.write_text(name, json.dumps(with_check(value) if checked else value, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file completely or not at all."""
        if self._active:
            files.write(self.path / name, text.encode())

    def note_failure(self, *, diverged: bool, reason: str) -> None:
        """Records why a run cannot continue, in `failure.json`."""
        self.write_json("failure.json", {"status": "diverged" if diverged else "failed", "reason": reason})

    def diverged(self) -> str | None:
        """Why the run diverged; None if it did not."""
        failure = self.read_json("failure.json")
        return failure.get("reason", "") if failure and failure.get("status") == "diverged" else None

    def forget_failure(self) -> None:
        """Removes the record, when the run is tried again."""
        if self._active:
            (self.path / "failure.json").unlink(missing_ok=True)

    def note_saved(self, step: int) -> None:
        """Records, in `saved.json`, that a checkpoint is on disk, so that it is noticed if all of them are gone one day."""
        self.write_json("saved.json", {"step": step})

    def set_earlier_result_aside(self, digests: Collection[str]) -> None:
        """Renames the result of an experiment that this one extends, by the digests of those: it goes on."""
        result = self.read_json("result.json") if self._active and digests else None
        if result is not None and result.get("config_digest") in (None, *digests):  # the earliest versions wrote none
            (self.path / "result.json").rename(files.free_name(self.path / "result.json"))

    def set_unfinished_result_aside(self, steps: int) -> None:
        """Renames the result of fewer steps, which `compress` left: the network is trained on."""
        result = self.read_json("result.json") if self._active else None
        if result is not None and type(result.get("step")) is int and result["step"] < steps:
            (self.path / "result.json").rename(files.free_name(self.path / "result.json"))

    def set_result_aside(self) -> None:
        """Renames what says that the run was saved, or has finished; it begins anew."""
        if self._active:
            (self.path / "saved.json").unlink(missing_ok=True)
            if (self.path / "result.json").exists():
                (self.path / "result.json").rename(files.free_name(self.path / "result.json"))

    def set_ranks_aside(self) -> str | None:
        """Renames the ranks that a budget chose, when the run begins anew; returns their new name, None if there are none."""
        if not self._active or not (self.path / RANKS).exists():
            return None
        other = files.free_name(self.path / RANKS)
        (self.path / RANKS).rename(other)
        return other.name

    def saved(self) -> int | None:
        """The latest step that is known to have been saved; None if there is none.

        Raises:
          WorkdirError: the file that says so is damaged.
        """
        for name in ("saved.json", "result.json"):
            record = self.read_json(name)
            if record is not None and type(record.get("step")) is not int:
                raise WorkdirError(f"{self.path}/{name} is damaged: it has no step")
            if record is not None:
                return record["step"]
        return None


def _advice(found: dict[str, Any], config: dict[str, Any]) -> str:
    """What to do about a folder of another experiment."""
    shorter = any(config[unit] and found[unit] and config[unit] < found[unit] for unit in ("steps", "epochs"))
    if not shorter and set(differing_keys([flatten(found), flatten(json.loads(json.dumps(config)))])) <= _LENGTH:
        return "To go on from its end, add --extend; else use a new --workdir, or the old values."
    return "Use a new --workdir, or the old values."
