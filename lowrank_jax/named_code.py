"""Code that a text names: "package.module:attribute"."""

import importlib
import importlib.util
import pathlib
import sys
from typing import Any

from lowrank_jax.text import first_line


def is_code(name: str) -> bool:
    """Whether a text has the form "package.module:attribute"."""
    module, _, attribute = name.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), attribute))


def import_attribute(name: str, kind: str) -> Any:
    """What "package.module:attribute" names; `kind` is what to call it in messages.

    Raises:
      ValueError: it cannot be imported, or its file lies in the work directory of a run.
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
        if spec and spec.origin and (run := _work_directory(spec.origin)):
            raise ImportError(f"{spec.origin} lies in {run}, the work directory of a run; code there is not looked up")
        importlib.import_module(name)
    return sys.modules[module]


def _work_directory(file: str) -> pathlib.Path | None:
    """The run's folder that a file lies in; every folder below the current one is a package to Python."""
    folders = pathlib.Path(file).resolve().parents
    return next((folder for folder in folders if _is_run(folder)), None)


def _is_run(folder: pathlib.Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
