"""Code that a text names: "package.module:attribute", or "path/file.py:attribute"."""

import contextlib
import contextvars
import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lowrank_jax.text import first_line


def is_code(name: str) -> bool:
    """Whether a text has the form "package.module:attribute" or "path/file.py:attribute"."""
    place, _, attribute = name.rpartition(":")
    if not attribute.isidentifier() or "\0" in place:
        return False
    return is_file(name) or all(part.isidentifier() for part in place.split("."))


def is_file(name: str) -> bool:
    """Whether it is a file that a name of code gives, rather than a module."""
    place = name.rpartition(":")[0]
    return place.endswith(".py") and pathlib.PurePath(place).name != ".py"


def import_attribute(name: str, kind: str, folder: str | None = None) -> Any:
    """What "package.module:attribute" or "path/file.py:attribute" names.

    Args:
      name: of the code.
      kind: what to call it in messages.
      folder: where modules are looked up besides the places that Python knows, and where a relative path begins; None for no
        folder, and the current one.

    Raises:
      ValueError: it cannot be imported, its file lies in a folder where nothing is looked up (see `not_in`), or a module of the
        same name has been imported from another folder.
    """
    if not is_code(name):
        form = 'it must look like "package.module:attribute" or "path/file.py:attribute"'
        raise ValueError(f"{kind} {name!r} cannot be imported: {form}")
    place, _, attribute = name.rpartition(":")
    before = set(sys.modules.copy())  # another thread may be importing
    try:
        with folder_kept():
            module = _from_file(pathlib.Path(folder or "", place)) if is_file(name) else _imported(place, folder)
        return getattr(module, attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's module may raise, SystemExit too
        raise ValueError(f"{kind} {name!r} cannot be imported: {first_line(error)}{_hint(error, folder)}") from None
    finally:
        _note(set(sys.modules.copy()) - before)


@contextlib.contextmanager
def folder_kept() -> Iterator[None]:
    """Whatever somebody's code does to the current folder, relative paths mean afterwards what they meant before.

    Raises:
      FileNotFoundError: the current folder has been deleted.
    """
    folder = pathlib.Path.cwd()
    try:
        yield
    finally:
        os.chdir(folder)


def _hint(error: BaseException, folder: str | None) -> str:
    """Where was looked, for a module that was not found."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return f", neither among the installed packages nor in {folder}" if folder else ", and no code_dir is set"


def folder_of(names: Iterable[str], candidates: Sequence[pathlib.Path]) -> str | None:
    """The first folder in which those of these names are found that are not found without one; None if no folder is needed.

    Nothing is imported.  If no folder has all of them it is the first one, so that a message can say where was looked.
    """
    needed = [name for name in names if is_code(name) and not _is_found(name, None)]
    if not needed:
        return None
    fitting = (folder for folder in candidates if all(_is_found(name, folder) for name in needed))
    return str(next(fitting, candidates[0]).resolve())


def _is_found(name: str, folder: pathlib.Path | None) -> bool:
    place = name.rpartition(":")[0]
    if is_file(name):
        return pathlib.Path(place).is_absolute() if folder is None else (folder / place).is_file()
    first = place.split(".")[0]
    if folder is not None:
        return _is_module(folder, first)
    if first in sys.modules:
        return not _is_foreign(first, None)
    try:
        return _find(first) is not None
    except (ImportError, ValueError):
        return False


def _find(module: str) -> Any:
    """The module's specification, by the places that Python knows without our folders and the current one."""
    kept, own = sys.path[:], {pathlib.Path().resolve(), *_folders}
    sys.path[:] = [place for place in kept if pathlib.Path(place).resolve() not in own]
    try:
        return importlib.util.find_spec(module)
    finally:
        sys.path[:] = kept


def _is_module(folder: pathlib.Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()


def _imported(module: str, folder: str | None) -> types.ModuleType:
    """The module.  A package is imported before what is in it is looked for, so that each is checked before it runs."""
    parts = module.split(".")
    if folder is not None and not _is_found(f"{module}:_", None):
        _open(pathlib.Path(folder).resolve())
    for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        _check_open(spec.origin if spec else None)
        importlib.import_module(name)
    return sys.modules[module]


def _from_file(file: pathlib.Path) -> types.ModuleType:
    """The module that a file is, which finds other modules beside it."""
    file = file.resolve()
    if not file.is_file():
        raise ImportError(f"there is no file {file}")
    _check_open(str(file))
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"  # no package's
    if name in sys.modules:
        return sys.modules[name]
    _open(file.parent)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_folders: list[pathlib.Path] = []
"""The users' folders that modules have been imported from."""

_stamps: dict[str, tuple[int, int] | None] = {}
"""The modules that were imported from them, and what tells whether their files have changed since."""


def forget_changed() -> None:
    """If a file that was imported from a user's folder has changed since, what was is imported anew when it is next needed.

    All of it: modules that have imported one another belong together.  For where something new begins, as in a notebook.
    """
    if all(_stamp(sys.modules[name]) == stamp for name, stamp in _stamps.items() if name in sys.modules):
        return
    for name in _stamps:
        sys.modules.pop(name, None)
    _stamps.clear()
    _look_anew()


def _note(names: Iterable[str]) -> None:
    """Of modules that have just been imported, those that lie in users' folders."""
    for name in names:
        top, module = name.partition(".")[0], sys.modules.get(name)
        if module is not None and top in sys.modules and _place_of(top) in _folders:
            _stamps[name] = _stamp(module)


def _stamp(module: types.ModuleType) -> tuple[int, int] | None:
    try:
        found = pathlib.Path(module.__file__ or "").stat()
    except (OSError, AttributeError):
        return None
    return found.st_mtime_ns, found.st_size


def _open(folder: pathlib.Path) -> None:
    """Lets modules be found in a folder, after all other places.

    Raises:
      ImportError: a module of it has the name of one that was imported from another such folder; Python has a name once.
    """
    _check_open(str(folder / "module.py"))
    _look_anew()
    tops = [name for name in sys.modules.copy() if "." not in name]  # another thread may be importing
    for name in [name for name in tops if _is_module(folder, name) and _is_foreign(name, folder)]:
        raise ImportError(
            f"{folder / name} cannot be told from the {name!r} that was imported from {_place_of(name)}; rename one of them"
        )
    if folder not in _folders:
        _folders.append(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _look_anew() -> None:
    """New files are seen.  Python goes through a dictionary for that, which another thread's import may change."""
    for _ in range(10):
        with contextlib.suppress(RuntimeError):
            importlib.invalidate_caches()
            return
    importlib.invalidate_caches()


def _is_foreign(name: str, folder: pathlib.Path | None) -> bool:
    """Whether a module has been imported from another of the users' folders."""
    place = _place_of(name)
    return place in _folders and place != folder


def _place_of(name: str) -> pathlib.Path | None:
    """The folder that a module of the highest level lies in."""
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    if file is not None:
        parent = pathlib.Path(file).resolve().parent
        return parent.parent if hasattr(module, "__path__") else parent
    path = [*getattr(module, "__path__", ())]
    return pathlib.Path(path[0]).resolve().parent if path else None


def _check_open(origin: str | None) -> None:
    """Refuses a file in a folder where nothing is looked up."""
    if origin and (folder := _closed.get()) in pathlib.Path(origin).resolve().parents:
        raise ImportError(f"{origin} lies in {folder}, the work directory that is read; no code is looked up there")


@contextlib.contextmanager
def not_in(folder: str) -> Iterator[None]:
    """Nothing is imported out of this folder; Python takes every folder below the current one for a package."""
    token = _closed.set(pathlib.Path(folder).resolve())
    try:
        yield
    finally:
        _closed.reset(token)


_closed: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar("closed", default=None)
