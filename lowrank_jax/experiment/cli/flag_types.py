"""Types of flags: each reads a value from text, or raises `argparse.ArgumentTypeError`."""

import argparse
import math
import pathlib

from lowrank_jax.experiment.duration import Duration
from lowrank_jax.named_code import is_code
from lowrank_jax.text import shown


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a list of numbers such as 0.05,0.1") from None


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_LARGEST = 2**31 - 1


def count(text: str) -> int:
    return _at_least(1, text, "must be a whole number of at least 1")


def whole(text: str) -> int:
    return _at_least(0, text, "must be a whole number")


def _at_least(low: int, text: str, rule: str) -> int:
    if not text.isdecimal() or not low <= (number := int(text[:20])):
        raise argparse.ArgumentTypeError(f"{shown(text)} {rule}")
    if number > _LARGEST:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be at most {_LARGEST}")
    return number


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a number of seconds above 0")
    return value


def duration(text: str) -> Duration:
    try:
        return Duration.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be {error}") from None


def text(given: str) -> str:
    if not given:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        given.encode()
    except UnicodeEncodeError:  # a name of other bytes, which neither TensorFlow nor JSON can hold
        raise argparse.ArgumentTypeError(f"{given!r} is not UTF-8; rename it, or set LANG=C.UTF-8") from None
    return given


def picture(given: str) -> str:
    if pathlib.Path(text(given)).suffix.lower() not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{shown(given)} must end in .png or .svg")
    return given


def code(text: str) -> str:
    if not is_code(text):
        raise argparse.ArgumentTypeError(f'{shown(text)} must look like "package.module:attribute"')
    return text
