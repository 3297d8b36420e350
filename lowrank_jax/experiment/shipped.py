"""The configs that come with the package, by name, and its documents: in a wheel beside its modules, else in a checkout."""

import ast
import functools
import pathlib

import lowrank_jax


@functools.cache
def folder() -> pathlib.Path:
    """Where they are."""
    package = pathlib.Path(lowrank_jax.__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def documents() -> list[pathlib.Path]:
    """What there is to read, the README first."""
    package = pathlib.Path(lowrank_jax.__file__).resolve().parent
    installed = package / "docs"
    if installed.is_dir():
        return [installed / "README.md", installed / "your_own.md"]
    return [package.parent / "README.md", package.parent / "docs" / "your_own.md"]


def names() -> list[str]:
    """All of them, sorted."""
    return sorted(file.stem for file in folder().glob("*.py"))


def is_name(text: str) -> bool:
    """Whether a text is a config's name rather than a path: without a folder and without the suffix of a file."""
    return bool(text) and "/" not in text and "\\" not in text and not text.endswith(".py") and text not in (".", "..")


def path(name: str) -> pathlib.Path:
    """The file of a shipped config, which need not exist."""
    return folder() / f"{name}.py"


def summary(name: str) -> str:
    """The first line of its docstring; it is not run."""
    return (ast.get_docstring(ast.parse(path(name).read_text(encoding="utf-8"))) or "").partition("\n")[0]
