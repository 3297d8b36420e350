"""Code that a text names: "package.module:attribute"."""

import contextlib
import contextvars
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from lowrank_jax.text import first_line


def is_code(name: str) -> bool:
    """Whether a text has the form "package.module:attribute"."""
    module, _, attribute = name.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), attribute))


def import_attribute(name: str, kind: str) -> Any:
    """What "package.module:attribute" names; `kind` is what to call it in messages.

    Raises:
      ValueError: it cannot be imported, or its file lies in a folder where nothing is looked up; see `not_in`.
    """
    if not is_code(name):
        raise ValueError(f'{kind} {name!r} cannot be imported: it must look like "package.module:attribute"')
    module, _, attribute = name.partition(":")
    try:
        return getattr(_imported(module), attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's module may raise, SystemExit too
        raise ValueError(f"{kind} {name!r} cannot be imported: {first_line(error)}") from None


def _imported(module: str) -> Any:
    """The module.  A package is imported before what is in it is looked for, so that each is checked before it runs."""
    parts = module.split(".")
    for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec and spec.origin and (folder := _closed.get()) in pathlib.Path(spec.origin).resolve().parents:
            raise ImportError(f"{spec.origin} lies in {folder}, the work directory that is read; no code is looked up there")
        importlib.import_module(name)
    return sys.modules[module]


@contextlib.contextmanager
def not_in(folder: str) -> Iterator[None]:
    """Nothing is imported out of this folder; Python takes every folder below the current one for a package."""
    token = _closed.set(pathlib.Path(folder).resolve())
    try:
        yield
    finally:
        _closed.reset(token)


_closed: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar("closed", default=None)
