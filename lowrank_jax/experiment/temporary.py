"""Folders for what nobody needs once the work is done."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

from lowrank_jax.experiment import interrupts


@contextlib.contextmanager
def folder(prefix: str) -> Iterator[str]:
    """A folder that goes when the work is done, when it fails and when a signal ends it."""
    with tempfile.TemporaryDirectory(prefix=prefix) as path, interrupts.cleaning_up(lambda: shutil.rmtree(path)):
        yield path
