"""Helpers for messages and tables: did-you-mean, alignment, counts."""

import difflib
import html
import re
from collections.abc import Iterable

_LISTED = 100  # of what is known, in a message


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    try:
        text = str(error)
    except Exception:  # whatever somebody's error may raise
        text = ""
    return next(filter(None, map(str.strip, text.splitlines())), type(error).__name__)


def shown(value: object) -> str:
    """A value in a message: as Python writes it, cut short."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # whatever somebody's type may raise
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:160]} ... ({len(text)} characters)"


def one_line(text: str) -> str:
    """Text without line breaks and control characters, which could command a terminal: what does not print is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in re.sub(r"\s+", " ", text))


def printable(text: str) -> str:
    """Text of several lines for a terminal, each as by `one_line`."""
    return "\n".join(map(one_line, text.splitlines()))


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most similar to `name`; None if there are no candidates."""
    return max(candidates, key=lambda c: difflib.SequenceMatcher(None, name, c).ratio(), default=None)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The clause "; did you mean x?" if a candidate is close, else a list of the candidates, of very many the first."""
    candidates = [str(c) for c in candidates]
    close = difflib.get_close_matches(str(name), candidates, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    more = f" and {len(candidates) - _LISTED} more" if len(candidates) > _LISTED else ""
    return f"; known: {', '.join(candidates[:_LISTED]) or 'none'}{more}"


def align(rows: list[list[str]]) -> str:
    """Rows as lines of left-aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table; the first row is its header."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def html_table(rows: list[list[str]]) -> str:
    """Rows as a table in HTML; the first row is its header."""

    def line(row: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"

    header, *body = rows
    lines = "\n".join(line(row, "td") for row in body)
    return f"<table>\n<thead>\n{line(header, 'th')}\n</thead>\n<tbody>\n{lines}\n</tbody>\n</table>"


def with_change(planned: int, dense: int) -> str:
    """A count, and its change from the dense one in percent."""
    change = f" {100 * (planned - dense) / dense:+.0f}%" if dense and planned != dense else ""
    return count(planned) + change


def count(n: int) -> str:
    """A count with three significant digits: 9.41k, 118M, 4.1G."""
    for size, suffix in ((10**18, "E"), (10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{suffix}" if n < 999.5 * size else f"{n / size:.0f}{suffix}"
    return str(n)
