import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.experiment.sweep.grammar import parse


def test_every_combination_the_last_term_fastest():
    axes = parse("lowrank.scale=0.05,0.1; lowrank.method=spectral,random;seed=0:2")
    assert axes.keys == ["lowrank.scale", "lowrank.method", "seed"]
    assert [tuple(assignment.values()) for assignment in axes.assignments()] == list(
        itertools.product(["0.05", "0.1"], ["spectral", "random"], ["0", "1"])
    )


def test_zip_keeps_together_what_belongs_together():
    axes = parse("zip(batch_size=64,128; optim.lr=0.1,0.2); seed=3")
    assert axes.assignments() == [
        {"batch_size": "64", "optim.lr": "0.1", "seed": "3"},
        {"batch_size": "128", "optim.lr": "0.2", "seed": "3"},
    ]


def test_tune_marks_its_keys():
    axes = parse("tune(optim.lr=0.1,0.2; optim.momentum=0,0.9); seed=0:2;")
    assert axes.tuned == ("optim.lr", "optim.momentum")
    assert len(axes.assignments()) == 8


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=(1, 2),(3,)", ["(1, 2)", "(3,)"]),
        ("a='x,y',\"p;q\"", ["'x,y'", '"p;q"']),
        ("a=[{'k': (1, 2)}]", ["[{'k': (1, 2)}]"]),
        ("a=train[:50%],train[50%:]", ["train[:50%]", "train[50%:]"]),
        ("a=-2:2", ["-2", "-1", "0", "1"]),
        ("a=0:10:4", ["0", "4", "8"]),
        ("a=0:2,7", ["0", "1", "7"]),
        ("a=x=y", ["x=y"]),
    ],
)
def test_what_a_value_may_be(text, values):
    assert [assignment["a"] for assignment in parse(text).assignments()] == values


def test_in_a_zip_a_key_may_have_a_value_again():
    assert parse("zip(a=1,1,2; b=3,4,3)").assignments() == [{"a": "1", "b": "3"}, {"a": "1", "b": "4"}, {"a": "2", "b": "3"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; expected e.g."),
        (" ; ;", "empty; expected e.g."),
        ("seed", "'seed': expected key=value"),
        ("=1", "expected key=value"),
        ("seed=", "seed: contains an empty value"),
        ("seed=1,,2", "seed: contains an empty value"),
        ("seed=1,1", "seed: 1 given twice"),
        ("zip(a=1,2,1; b=3,4,3)", "a, b: 1, 3 given twice"),
        ("seed=5:5", "5:5: empty range"),
        ("seed=1; seed=2", "seed: given 2 times"),
        ("tune(optim.lr=1); optim.lr=2", "optim.lr: given 2 times"),
        ("a=(1,2", "missing \\)"),
        ("a=1)", "unmatched \\)"),
        ("a='x", "missing '"),
        ("zap(a=1)", "zap\\(...\\): unknown; known: zip"),
        ("zip(a=1,2; b=1)", "a has 2, b has 1"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError) as error:
        parse("seed=1,1; zap(a=2); b=")
    assert len(str(error.value).splitlines()) == 3


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5})?", fullmatch=True),
        st.lists(st.integers(), min_size=1, max_size=6, unique=True),
        min_size=1,
        max_size=4,
    )
)
def test_a_sweep_written_out_reads_back(axes):
    text = "; ".join(f"{key}={','.join(map(str, values))}" for key, values in axes.items())
    read = parse(text).assignments()
    expected = [dict(zip(axes, map(str, values), strict=True)) for values in itertools.product(*axes.values())]
    assert read == expected


@given(st.text(max_size=40))
def test_no_text_ends_in_anything_but_an_answer_or_a_value_error(text):
    try:
        parse(text)
    except ValueError as error:
        assert str(error)
