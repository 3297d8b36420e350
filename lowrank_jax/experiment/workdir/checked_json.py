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


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
