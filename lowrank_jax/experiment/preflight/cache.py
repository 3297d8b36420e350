"""A folder that remembers what the compiler said of programs."""

import dataclasses
import json
import os
import pathlib
import threading

from lowrank_jax.experiment.preflight.compiler import Cost, Program
from lowrank_jax.experiment.workdir import files


class Cache:
    """Estimates as JSON files, one per key; without a folder it stores nothing."""

    def __init__(self, folder: pathlib.Path | None):
        self._folder = folder

    def get(self, key: str) -> Program | None:
        """The stored estimate; None if there is none, or if its file cannot be read."""
        if self._folder is None:
            return None
        try:
            read = json.loads((self._folder / f"{key}.json").read_text())
            cost = read["cost"] and Cost(**read["cost"])
            return Program(int(read["peak_bytes"]), cost, float(read["compile_seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, program: Program) -> None:
        """Stores an estimate.  Raises OSError if it cannot be written."""
        if self._folder is None:
            return
        files.make_folder(self._folder)
        part = self._folder / f"{key}.{os.getpid()}.{threading.get_ident()}.part"
        part.write_text(json.dumps(dataclasses.asdict(program), indent=2) + "\n")
        part.rename(self._folder / f"{key}.json")
