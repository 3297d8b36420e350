"""What messages are made of."""

import pytest

from lowrank_jax.text import did_you_mean, first_line


def test_did_you_mean_proposes_or_lists():
    assert did_you_mean("scael", ["scale", "rank"]) == "; did you mean scale?"
    assert did_you_mean("zzz", ["scale", "rank"]) == "; known: scale, rank"


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError("no space\nleft"), "no space"), (KeyError(), "KeyError"), (ValueError("\n\n of what \n"), "of what")],
)
def test_of_a_long_error_the_first_line_and_of_a_silent_one_its_type(error, line):
    assert first_line(error) == line
