"""Types of flags: each reads a value from text, or raises `argparse.ArgumentTypeError`."""

import argparse
import math

from lowrank_jax.experiment.duration import Duration
from lowrank_jax.named_code import is_code


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.05,0.1") from None


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return value


def duration(text: str) -> Duration:
    try:
        return Duration.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be {error}") from None


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def code(text: str) -> str:
    if not is_code(text):
        raise argparse.ArgumentTypeError(f'{text!r} must look like "package.module:attribute"')
    return text
