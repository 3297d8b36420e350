"""Messages and tables."""

import xml.etree.ElementTree as ElementTree

import pytest

from lowrank_jax.text import align, count, did_you_mean, first_line, html_table, markdown_table, nearest, printable, with_change


def test_did_you_mean_proposes_or_lists():
    assert did_you_mean("scael", ["scale", "rank"]) == "; did you mean scale?"
    assert did_you_mean("zzz", ["scale", "rank"]) == "; known: scale, rank"
    assert did_you_mean("zzz", [f"a{i}" for i in range(612)]).endswith(", a98, a99 and 512 more")


class Unwritable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no space\nleft"), "no space"),
        (KeyError(), "KeyError"),
        (ValueError("\n\n of what \n"), "of what"),
        (Unwritable(), "Unwritable"),
    ],
)
def test_of_a_long_error_the_first_line_and_of_a_silent_one_its_type(error, line):
    assert first_line(error) == line


def test_what_is_printed_commands_no_terminal():
    assert printable("a\n\x1b]0;b\x07\n") == "a\n\\x1b]0;b\\x07" and printable("") == ""


def test_the_nearest_is_the_most_similar():
    assert nearest("kernl", ["bias", "kernel"]) == "kernel"
    assert nearest("kernl", []) is None


def test_tables_are_aligned_or_markdown():
    assert align([["a", "bc"], ["def", ""]]) == "a    bc\ndef"
    assert markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_an_html_table_has_the_cells_whatever_is_in_them():
    rows = [["name", "note"], ["a/kernel", "<script>"], ["b & c", '"x" < 2']]
    table = ElementTree.fromstring(html_table(rows))
    assert [[cell.text for cell in row] for row in table.iter("tr")] == rows
    assert [cell.tag for cell in table.iter() if cell.tag in ("th", "td")] == ["th"] * 2 + ["td"] * 4


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (999, "999"), (9_412, "9.41k"), (999_499, "999k"), (118_000_000, "118M"), (4_100_000_000, "4.1G")]
)
def test_counts_have_three_digits(n, text):
    assert count(n) == text


def test_a_change_is_told_in_percent_where_there_is_one():
    assert with_change(250, 1000) == "250 -75%"
    assert with_change(1000, 1000) == "1k"
    assert with_change(5, 0) == "5"
