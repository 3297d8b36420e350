"""The files of a work directory other than checkpoints and event files."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

# What may change between two starts of one experiment: where things are, how often they are written, how many devices.
_FREE = ("dataset.data_dir", "eval.batch_size", "checkpoint.", "log.", "mesh.")


class WorkdirError(Exception):
    """The work directory cannot be used; the message says what to do."""


class Workdir:
    """A folder, local or remote, that holds one experiment."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    def claim(self, config: dict[str, Any]) -> None:
        """Marks the folder as this experiment's.

        Raises:
          WorkdirError: it belongs to another one, or cannot be written.
        """
        self.check(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", config)
        except OSError as error:
            raise WorkdirError(f"cannot write to {self.path}: {error.strerror or error}") from None

    def check(self, config: dict[str, Any]) -> None:
        """Raises WorkdirError if the folder belongs to another experiment."""
        if self.path.exists() and not self.path.is_dir():
            raise WorkdirError(f"{self.path} is a file; --workdir must name a folder")
        stored = self.path / "config.json"
        if stored.exists():
            differences = _differences(self.read_config(), config)
            if differences:
                raise WorkdirError(
                    f"{self.path} belongs to another experiment: {'; '.join(differences)}."
                    " Use a new --workdir, or the old values."
                )

    def read_config(self) -> dict[str, Any]:
        """The config that the experiment was started with.

        Raises:
          WorkdirError: there is none.
        """
        try:
            config = json.loads((self.path / "config.json").read_text())
            if not isinstance(config, dict):
                raise ValueError("it is no mapping")
            return config
        except (FileNotFoundError, NotADirectoryError):
            raise WorkdirError(f"{self.path} is not a work directory: it has no config.json") from None
        except ValueError as error:
            raise WorkdirError(f"{self.path}/config.json is damaged: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(text)
        partial.replace(self.path / name)

    def append_line(self, name: str, line: dict[str, Any]) -> None:
        """One object a line, as in metrics.jsonl."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """What `append_line` wrote, without the line that a kill cut short."""
        file, lines = self.path / name, []
        for text in file.read_text().splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def write_lines(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """Writes a file of such lines whole or not at all."""
        self.write_text(name, "".join(json.dumps(line) + "\n" for line in lines))

    def forget_metrics_after(self, step: int, *, evaluated: bool) -> None:
        """Drops what an interrupted run wrote beyond the step that it goes on from, so that the file reads as one run."""
        if not (self.path / "metrics.jsonl").exists():
            return
        kept = []
        for line in self.read_lines("metrics.jsonl"):
            repeated = line["step"] == step and not evaluated and any(key.startswith("eval/") for key in line)
            if line["step"] <= step and not repeated:
                kept.append(line)
        self.write_lines("metrics.jsonl", kept)


def config_digest(config: dict[str, Any]) -> str:
    """A short name for an experiment: equal for configs that may share a work directory."""
    text = json.dumps({key: value for key, value in sorted(_flat(config).items()) if not key.startswith(_FREE)})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    old, new = _flat(old), _flat(json.loads(json.dumps(new)))
    keys = [key for key in sorted(old.keys() | new.keys()) if not key.startswith(_FREE)]
    return [
        f"{key} is {old.get(key, 'not set')} there, {new.get(key, 'not set')} here"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
