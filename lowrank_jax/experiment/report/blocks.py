"""What a page is made of, however it is written.

The texts may hold anything: `rendering` sees to it that none of them becomes markup.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Code:
    """A name within a text, in the font of code."""

    text: str


@dataclasses.dataclass(frozen=True)
class Emphasis:
    """A term within a text."""

    text: str


Inline = str | Code | Emphasis


@dataclasses.dataclass(frozen=True)
class Heading:
    kind: ClassVar[str] = "heading"
    text: str
    level: int = 2


class Paragraph:
    kind: ClassVar[str] = "paragraph"

    def __init__(self, *parts: Inline):
        self.parts = parts


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells; the first row is the header."""

    kind: ClassVar[str] = "table"
    rows: Sequence[Sequence[Inline]]


@dataclasses.dataclass(frozen=True)
class Preformatted:
    kind: ClassVar[str] = "preformatted"
    lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file next to the page, or within it."""

    kind: ClassVar[str] = "picture"
    name: str
    content: bytes
    alt: str


Block = Heading | Paragraph | Table | Preformatted | Picture
