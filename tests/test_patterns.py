"""Patterns match what Python's match, and end."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.patterns import compile_pattern

NAMES = [
    "",
    "a",
    "kernel",
    "head/kernel",
    "stage1/block1/conv1/kernel",
    "stage1/block1/conv1/kernel/u",
    "A_1",
    "a\n",
    "ä",
    "é",
    "\u212a",
]
PATTERNS = [
    ".*", "(.*/)?(kernel|embedding)(/[uv])?", "stage[0-9]+/.*", "[^/]*", r"\w+", r"\W", r"\d*", "head/kernel", "(a|b)*?",
    "a{0,3}", "^a$", r"\bkernel\b", r".*\Bernel", "(?:stage|head).*l", ".+?/.+", "[a-c_]+", "(?P<name>k).*", "a|", "",
    r"\Aa\Z", "[^a]", "a?" * 20, "(a{2}){3}", "(a{2,}){1,2}", "(a|aa)+",
    "(?!head).*", "(?=.*kernel).*", ".*(?<!kernel)", ".*(?<=/u)", "(?:(?!conv).)*", "(?!(stage|head)).*|.*(?=/u)/.",
    "(?!.*(?<!l)$).*",
    "(?i)KERNEL", "(?i:KER)nel", "(?s).*", "(?m)^a$\n?", "(?x) a  # one letter", "(?i)[^K].*", "(?-i:a)", r"(?a)\w",
    r"(?a:\w)", r"(?a:\W)", "(?ia:k)", "(?i:k)", r"(?a:(?u:\w))",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_they_match_what_python_matches(pattern):
    matches, python = compile_pattern(pattern), re.compile(pattern)
    for name in (*NAMES, *("a" * count for count in range(1, 14))):
        assert matches(name) == (python.fullmatch(name) is not None), name


parts = st.sampled_from(["a", "b", "/", ".", "[ab]", "[^a]", r"\w"])
trees = st.recursive(
    parts,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(st.sampled_from(["(?!", "(?="]), inner).map(lambda pair: f"{pair[0]}{pair[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{1,2}", "{0,3}", "{0}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        parts.map(lambda part: f"{part}*"),
    ),
    max_leaves=8,
)


@given(trees, st.text("ab/c", max_size=8))
def test_they_match_what_python_matches_whatever_they_are(pattern, text):
    assert compile_pattern(pattern)(text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*(.*)*(.*)*x$", "(a+)+(a+)+b", ".*" * 200 + "x", "(a|a|a|.|.)*(a|.)*(.|.)*$x", "(((((((a*)*)*)*)*)*)*)*b",
        "(((.{0,1000}){0,1000}){0,1000}){0,1000}b", "(((a{1000}){1000}){1000}){1000}", "(((a?){999}){999}){999}b",
        "(?=(.*)*(.*)*(.*)*x$).*", "((?!(a*)*b)a)*b", "(?<=a)b",
        *(f"{look * depth}x{')' * look.count('(') * depth}.*" for look in ("(?=.*", "(?=.*(?!.*(?!.*") for depth in (5, 30)),
    ],
)  # fmt: skip
def test_they_end(pattern):
    assert not compile_pattern(pattern)("a" * 60)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(.)\1", "a reference to a group is not supported"),
        ("(?>a)b", "an atomic group is not supported"),
        ("a*+b", "a possessive quantifier is not supported"),
        ("(a", "missing ), unterminated subpattern"),
        ("(" * 10_000, "."),
        ("a{99999999999999999999}", "too large"),
    ],
)
def test_what_they_cannot_be_is_refused(pattern, reason):
    with pytest.raises(
        ValueError, match=rf"^rule .* is not a regular expression: .*{re.escape(reason) if reason != '.' else ''}"
    ):
        compile_pattern(pattern)


@pytest.mark.filterwarnings("error")
def test_what_a_later_python_may_read_otherwise_is_taken_as_this_one_reads_it():
    matches, same = compile_pattern("[[:alpha:]/]*kernel"), re.compile(r"[a\[:lph]/\]*kernel")
    for name in ("a/]]kernel", "a/kernel", ":/]kernel", "akernel", "z/kernel"):
        assert matches(name) == bool(same.fullmatch(name))
