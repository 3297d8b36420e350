"""The files of a work directory other than checkpoints and event files."""

import contextlib
import errno
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import filelock
from etils import epath
from upath import UPath

from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.workdir.identity import defaults, differences, flatten
from lowrank_jax.text import first_line

# Without these a config.json belongs to something else.
_REQUIRED = {"seed", "dataset.name", "model.name", "lowrank.method"}
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what a file system without locks answers
_EPATH = ("gs://", "s3://", "az://", "hf://")


class WorkdirError(UserError):
    """The work directory cannot be used; the message says what to do."""


class Workdir:
    """The folder of one experiment, local or remote.

    Args:
      path: the folder.
      active: whether to write anything; in a run of several processes only the first one does.
    """

    def __init__(self, path: epath.PathLike, *, active: bool = True):
        self._active = active
        # Training writes where epath can; reports are also read from other places that fsspec supports.
        other = re.match(r"[a-z0-9+]+://", str(path)) and not str(path).startswith(_EPATH)
        self.path: Any = UPath(str(path)) if other else epath.Path(path)

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    def claim(self, config: dict[str, Any]) -> None:
        """Claims the folder for this experiment.

        Raises:
          WorkdirError: it belongs to another experiment, or cannot be written.
        """
        if not self._active:
            return
        self.check_bucket()
        self.check(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", config)
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

    @contextlib.contextmanager
    def locked(self, seconds: float = 10.0) -> Iterator[None]:
        """Keeps other processes of this machine from training in the folder.

        Does nothing if the folder is remote or its file system has no locks.  A process that is killed frees its lock.

        Raises:
          WorkdirError: another process still holds the lock after so many seconds, which one that is ending may need.
        """
        if "://" in str(self.path) or not self._active:
            yield
            return
        lock = contextlib.ExitStack()
        held = filelock.FileLock(str(self.path / ".lock"), timeout=seconds, poll_interval=0.1, fallback_to_soft=False)
        try:
            lock.enter_context(held.acquire())
        except filelock.Timeout:
            raise WorkdirError(f"another process is training in {self.path}; stop it, or use a new --workdir") from None
        except NotImplementedError:
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with lock:
            yield

    def check(self, config: dict[str, Any]) -> None:
        """Raises WorkdirError if the folder belongs to another experiment."""
        if self.path.exists() and not self.path.is_dir():
            raise WorkdirError(f"{self.path} is a file; --workdir must name a folder")
        stored = self.path / "config.json"
        if stored.exists():
            differing = differences(self.read_config(), config)
            if differing:
                raise WorkdirError(
                    f"{self.path} belongs to another experiment: {'; '.join(differing)}."
                    " Use a new --workdir, or the old values."
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
          WorkdirError: there is none, or it does not belong to an experiment.
        """
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
          WorkdirError: it is damaged.
        """
        try:
            value = json.loads((self.path / name).read_text())
            if not isinstance(value, dict):
                raise ValueError("it is not an object")
            return value
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise WorkdirError(f"{self.path}/{name} is damaged: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file completely or not at all."""
        if not self._active:
            return
        partial = self.path / f".{name}.partial"
        partial.write_text(text)
        partial.replace(self.path / name)

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

    def append_line(self, name: str, line: dict[str, Any]) -> None:
        """Appends an object as one line, as in metrics.jsonl."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """What `append_line` wrote, without a line that a kill cut short."""
        file, lines = self.path / name, []
        for text in file.read_bytes().decode(errors="replace").splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                lines += [line] if isinstance(line, dict) else []
        return lines

    def write_lines(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """Writes a file of such lines completely or not at all."""
        self.write_text(name, "".join(json.dumps(line) + "\n" for line in lines))

    def evaluations(self) -> list[tuple[int, float]]:
        """Step and top-1 of every evaluation so far; on the held-out split if there is one."""
        lines = self.read_lines("metrics.jsonl")
        return [(line["step"], line.get("valid/top1", line["eval/top1"])) for line in lines if "eval/top1" in line]

    def forget_metrics_after(self, step: int, *, evaluated: bool) -> None:
        """Drops the metrics that an interrupted run wrote after the step it resumes from, so that the file reads as one run."""
        if not (self.path / "metrics.jsonl").exists():
            return
        kept = []
        for line in self.read_lines("metrics.jsonl"):
            repeated = line["step"] == step and not evaluated and any(key.startswith("eval/") for key in line)
            if line["step"] <= step and not repeated:
                kept.append(line)
        self.write_lines("metrics.jsonl", kept)
