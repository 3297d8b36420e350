"""The lines of metrics.jsonl: a step and its numbers each, and a digest that tells whether they are as they were written."""

import json
import zlib
from typing import Any

from lowrank_jax.experiment.workdir.files import parse_json

Digest = dict[str, int]


def to_line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def parse(text: str) -> list[dict[str, Any]]:
    """The lines, without a last one that a kill cut short.

    Raises:
      ValueError: a line is not a step and its numbers; the message says which.
    """
    return [_parse_line(line, number) for number, line in enumerate(_whole_lines(text), start=1)]


def _whole_lines(text: str) -> list[str]:
    return text.split("\n")[:-1]


def _parse_line(text: str, number: int) -> dict[str, Any]:
    try:
        line = parse_json(text)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(line, dict) or not _is_whole(line.get("step")):
        raise ValueError(f"line {number} has no step")
    for name, value in line.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"line {number}: {name} is not a number")
    return line


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def digest(content: bytes) -> Digest:
    """The size of the file and a checksum of it, to be kept where nothing changes unnoticed."""
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def begins_with(content: bytes, kept: Digest) -> bool:
    """Whether the file still begins with what the digest was made of."""
    return digest(content[: kept["bytes"]]) == kept
