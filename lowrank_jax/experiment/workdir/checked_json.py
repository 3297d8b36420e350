"""JSON with a checksum, for records that nothing else protects."""

import json
import zlib
from typing import Any


def seal(body: dict[str, Any]) -> dict[str, Any]:
    """The object together with its checksum."""
    return {"body": body, "check": _checksum(body)}


def unseal(sealed: dict[str, Any]) -> dict[str, Any]:
    """What was sealed.  Raises ValueError if it has changed; KeyError or TypeError if it was not sealed."""
    if sealed["check"] != _checksum(sealed["body"]):
        raise ValueError("the record does not match its own digest")
    return sealed["body"]


def with_check(record: dict[str, Any]) -> dict[str, Any]:
    """The same record, with its checksum as one more entry: for files that people read too."""
    return {**record, _CHECK: _checksum(json.loads(json.dumps(record)))}


def without_check(record: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    """The record without its checksum, which earlier versions did not write.

    Args:
      record: as it was read.
      required: whether every version wrote one.

    Raises:
      ValueError: it has changed since it was written, or its checksum is gone.
    """
    if required and _CHECK not in record:
        raise ValueError(f"it was changed after it was written, or damaged: it has no {_CHECK!r}")
    body = {key: value for key, value in record.items() if key != _CHECK}
    if _CHECK in record and record[_CHECK] != _checksum(body):
        raise ValueError(f"it was changed after it was written, or damaged: its {_CHECK!r} is of other values")
    return body


_CHECK = "check"


def _checksum(body: dict[str, Any]) -> int:
    try:
        return zlib.crc32(json.dumps(body, sort_keys=True).encode())
    except RecursionError:  # it was just shallow enough to be read
        raise ValueError("it is nested too deeply") from None
