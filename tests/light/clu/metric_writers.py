"""In place of clu's writer, whose import of TensorFlow is half of a short run; see `running.environment`."""

import json
import os
import pathlib
from typing import Any


class SummaryWriter:
    """Writes lines of JSON where clu's writes TensorBoard's events."""

    def __init__(self, folder: str):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = (pathlib.Path(folder) / f"events.out.tfevents.{os.getpid()}").open("a")

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._file.write(json.dumps([step, scalars]) + "\n")

    def write_hparams(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
