"""Pages and tables as HTML, Markdown, CSV and lines of a terminal; no text in them becomes markup, formula or control code."""

import base64
import contextlib
import csv
import functools
import hashlib
import io
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

import jinja2

from lowrank_jax.experiment.report.blocks import Block, Code, Emphasis, Inline
from lowrank_jax.text import align, markdown_table, one_line


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """A page in one file, which runs no script and loads nothing."""
    environment = _environment()
    style = environment.get_template("page.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return environment.get_template("page.html.jinja").render(title=title, blocks=blocks, policy=policy)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowrank_jax.experiment.report", ""),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else one_line(str(value)),  # a macro's is escaped already
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.tests |= {"code": lambda part: isinstance(part, Code), "emphasis": lambda part: isinstance(part, Emphasis)}
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment


def as_markdown(blocks: Sequence[Block]) -> str:
    """The same page for a viewer of Markdown, with its pictures in files next to it."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Any) -> str:
    match block.kind:
        case "heading":
            return f"{'#' * block.level} {_escaped(block.text)}"
        case "paragraph":
            return _LIST.sub(r"\1\\\2", "".join(map(_inline, block.parts)))
        case "table":
            return markdown_table([[_inline(cell) for cell in row] for row in block.rows])
        case "preformatted":
            return "\n".join(f"    {one_line(line)}" for line in block.lines)
        case _:
            return f"![{_escaped(block.alt)}]({urllib.parse.quote(block.name)})"


_LIST = re.compile(r"^(\s*\d*)([-+=.)])")  # would begin a list, or underline a heading
# What has a meaning in Markdown or one of its dialects; letters on both sides of an underscore take it away.
_MEANING = re.compile(r"[\\`*\[\]|$~#^]|(?<![^\W_])_|_(?![^\W_])|:(?=/)|(?<=www)\.", re.I)
# An address or a mention would become a link: there is no escape for it, but a comment ends the word.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "@<!-- -->"}


def _inline(part: Inline) -> str:
    match part:
        case Code(text):
            text = one_line(text).strip()
            # A span of code has no escapes.
            return f"`{text}`" if text and not re.search(r"[`|\\]", text) else _escaped(text)
        case Emphasis(text):
            return f"*{_escaped(text)}*"
        case _:
            return _escaped(part)


def _escaped(text: str) -> str:
    return re.sub("[&<>@]", lambda found: _ENTITIES[found[0]], _MEANING.sub(r"\\\g<0>", one_line(text)))


# Before what a spreadsheet would take for a formula, in a cell or, where it splits lines at semicolons, within a text.
_FORMULA = re.compile(r'^(?=\s*[=+\-@＝＋－＠])|(?<=;)(?=[\s"]*[=+\-@＝＋－＠])')  # noqa: RUF001


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of numbers and texts; what a spreadsheet would take for a formula has an apostrophe before it."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([[_cell(value) for value in row] for row in rows])
    return file.getvalue()


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    text = one_line(str(value))
    with contextlib.suppress(ValueError):  # a setting
        float(text)
        return text
    return _FORMULA.sub("'", text)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal."""
    return align([[one_line(cell) for cell in row] for row in rows])
