"""metrics.jsonl: a step and its numbers in each line, and whether the lines are as they were written."""

import contextlib
import json
import pathlib
import zlib
from typing import Any

from lowrank_jax.checks import is_number
from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.workdir import files

_LARGEST = 2**30  # bytes; more than that is no run's

Digest = dict[str, int]
"""The size of the file and a checksum of it, to be kept where nothing changes unnoticed."""


class Metrics:
    """The metrics of a run, or of a watch beside it.

    Args:
      path: of the file, which need not exist.
      active: whether to write anything; in a run of several processes only the first one does.
    """

    def __init__(self, path: Any, *, active: bool = True):
        self.path, self._active = path, active
        self._size: int | None = None  # as this process has left it

    def append(self, line: dict[str, Any]) -> str | None:
        """Adds a line: `step` and numbers by name, None for those that are not finite.

        If another has changed the file since the last line it is set aside, and a new one begins with the step alone.

        Returns:
          None; of a file that has changed its new name, or "" if nothing was left of it.
        """
        if not self._active:
            return None
        aside = (self.set_aside() or "") if self._size not in (None, self._found()) else None
        begin = "" if aside is None else _to_text({"step": line["step"]})
        files.append(self.path, (begin + _to_text(line)).encode())
        self._size = self._found()
        return aside

    def _found(self) -> int | None:
        """The size of a local file; asking a bucket after every line would take too long."""
        if not files.is_local(self.path):
            return None
        try:
            return pathlib.Path(self.path).stat().st_size
        except FileNotFoundError:
            return 0

    def read(self) -> list[dict[str, Any]]:
        """The lines, without a last one that a kill cut short; none if there is no file.

        Raises:
          WorkdirError: a line is not a step and its numbers; the message says which.
        """
        try:
            *whole, last = self._content(_LARGEST).decode().split("\n")
            lines = [_to_line(text, number) for number, text in enumerate(whole, start=1)]
        except ValueError as error:
            raise WorkdirError(f"{self.path} is damaged: {error}") from None
        with contextlib.suppress(ValueError):
            lines.append(_to_line(last, len(lines) + 1))
        return lines

    def evaluations(self, metric: str) -> list[tuple[int, float]]:
        """Step and a metric of every evaluation so far where it counted somebody; on the held-out split if there is one."""
        evaluated = [(line["step"], line.get(f"valid/{metric}", line.get(f"eval/{metric}"))) for line in self.read()]
        return [(step, value) for step, value in evaluated if value is not None]

    def digest(self) -> Digest:
        """Of the file as it is."""
        return _digest(self._content())

    def check(self, digest: Any) -> None:
        """Raises WorkdirError if the file is not as it was when the digest was made, at the end of the run."""
        if digest != self.digest():
            raise WorkdirError(f"{self.path} has changed since the run ended")

    def cut_back(self, kept: Digest) -> str | None:
        """Cuts the file back to what it held when the digest was made, so that it reads as one run.

        If it does not begin with that any more it is set aside, and its new name is returned; "" if nothing is left of it.
        """
        content = self._content()
        beginning = content[: kept["bytes"]]
        if _digest(beginning) != kept:
            return self.set_aside() or ""
        if beginning != content:
            self._write(beginning)
        return None

    def cut_after(self, step: int, *, evaluated: bool) -> str | None:
        """The same where there is no digest: drops the lines after a step, and the step's evaluation if it is to come again."""
        try:
            lines = self.read()
        except WorkdirError:
            return self.set_aside() or ""
        last = step if evaluated else step - 1  # of the evaluations that are kept
        kept = [line for line in lines if line["step"] <= (last if _is_evaluation(line) else step)]
        self._write("".join(map(_to_text, kept)).encode())
        return None

    def drop_cut_line(self) -> None:
        """Drops a last line that a kill cut short, and that would spoil the next one."""
        content = self._content()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self._write(whole)

    def set_aside(self) -> str | None:
        """Renames the file, of which nothing is lost; returns its new name, or None if it has no lines."""
        if not self._active or not self._content():
            return None
        other = files.free_name(self.path)
        self.path.rename(other)
        return other.name

    def _content(self, largest: int | None = None) -> bytes:
        try:
            return files.read_bytes(self.path, largest)
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def _write(self, content: bytes) -> None:
        if self._active:
            files.write(self.path, content)


def _digest(content: bytes) -> Digest:
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def _to_text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _to_line(text: str, number: int) -> dict[str, Any]:
    try:
        line = files.parse_json(text)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(line, dict) or not files.is_count(line.get("step")):
        raise ValueError(f"line {number} has no step")
    for name, value in line.items():
        if value is not None and not is_number(value):
            raise ValueError(f"line {number}: {name} is not a number")
    return line


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(key.startswith("eval/") for key in line)
