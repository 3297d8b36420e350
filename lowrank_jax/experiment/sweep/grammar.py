"""The text of a sweep and its meaning.

    lowrank.scale=0.05,0.1; lowrank.method=spectral,kernel_projection; seed=0:5      every combination
    zip(batch_size=64,128; optim.lr=0.1,0.2)                                         values taken together
    tune(optim.lr=0.01,0.03,0.1)                                                     all at one seed, the best at the others

Semicolons separate terms and commas separate values, except inside brackets and quotes.  `a:b` and `a:b:step` are integer
ranges without b.  zip(...) inside tune(...) is not supported.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable

_RANGE = re.compile(r"(-?\d+):(-?\d+)(?::([1-9]\d*))?")
_GROUP = re.compile(r"(\w+)\((.*)\)", re.DOTALL)
_CLOSING = {"(": ")", "[": "]", "{": "}"}

MOST = 2000
"""Maximum number of trials in a sweep: more are taken for a typing mistake."""

Assignment = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Axes:
    """What a sweep varies.

    Attributes:
      terms: the assignments of each term; a trial takes one of each.
      tuned: the keys of which only the best value is wanted.
    """

    terms: tuple[tuple[Assignment, ...], ...]
    tuned: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        return [key for term in self.terms for key in term[0]]

    def assignments(self) -> list[Assignment]:
        """Every combination; the last term changes fastest."""
        return [_merged(parts) for parts in itertools.product(*self.terms)]


def parse(text: str) -> Axes:
    """Parses the text of a sweep.  Whether keys and values are legal is for the config to check.

    Raises:
      ValueError: a syntax error; one line per problem.
    """
    terms: list[tuple[Assignment, ...]] = []
    tuned: list[str] = []
    problems: list[str] = []
    for part in _parts(text, problems):
        try:
            group = _GROUP.fullmatch(part)
            if group is None:
                terms.append(_distinct(_axis(part)))
            elif group[1] == "zip":
                terms.append(_distinct(_zipped([_axis(inner) for inner in _split(group[2], ";")])))
            elif group[1] == "tune":
                axes = [_distinct(_axis(inner)) for inner in _split(group[2], ";")]
                terms += axes
                tuned += [key for axis in axes for key in axis[0]]
            else:
                raise ValueError(f"{group[1]}(...): unknown; known: zip(...), tune(...)")
        except ValueError as error:
            problems.append(str(error))
    keys = [key for term in terms for key in term[0]]
    problems += [f"{key}: given {keys.count(key)} times" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    trials = math.prod(len(term) for term in terms)
    if trials > MOST:
        problems.append(f"{trials} trials; must be at most {MOST}")
    if not terms and not problems:
        problems.append("empty; expected e.g. lowrank.scale=0.05,0.1; seed=0:3")
    if problems:
        raise ValueError("\n".join(problems))
    return Axes(tuple(terms), tuple(tuned))


def _parts(text: str, problems: list[str]) -> list[str]:
    try:
        return [part for part in _split(text, ";") if part]  # a semicolon at the end is fine
    except ValueError as error:
        problems.append(str(error))
        return []


def _axis(text: str) -> tuple[Assignment, ...]:
    """`key=a,b,c`."""
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ValueError(f"{text!r}: expected key=value,value,...")
    found = [value for part in _split(values, ",") for value in _range(part)]
    if "" in found:
        raise ValueError(f"{key}: contains an empty value")
    return tuple({key: value} for value in found)


def _distinct(values: tuple[Assignment, ...]) -> tuple[Assignment, ...]:
    """Raises ValueError if two are the same; in a zip, one key may have the same value in several of them."""
    twice = [", ".join(value.values()) for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"{', '.join(values[0])}: {'; '.join(sorted(set(twice)))} given twice")
    return values


def _range(text: str) -> Iterable[str]:
    match = _RANGE.fullmatch(text)
    if match is None:
        return [text]
    numbers = range(int(match[1]), int(match[2]), int(match[3] or 1))
    if not numbers:
        raise ValueError(f"{text}: empty range")
    if len(numbers) > MOST:
        raise ValueError(f"{text}: {len(numbers)} values; must be at most {MOST}")
    return map(str, numbers)


def _zipped(axes: list[tuple[Assignment, ...]]) -> tuple[Assignment, ...]:
    if len({len(axis) for axis in axes}) > 1:
        counts = ", ".join(f"{next(iter(axis[0]))} has {len(axis)}" for axis in axes)
        raise ValueError(f"zip(...): the keys need the same number of values; {counts}")
    return tuple(_merged(parts) for parts in zip(*axes, strict=True))


def _merged(parts: Iterable[Assignment]) -> Assignment:
    return {key: value for part in parts for key, value in part.items()}


def _split(text: str, separator: str) -> list[str]:
    """Splits outside brackets and quotes."""
    parts, begin, open_brackets, quote = [], 0, [], ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _CLOSING:
            open_brackets.append(_CLOSING[letter])
        elif letter in _CLOSING.values():
            if not open_brackets or open_brackets.pop() != letter:
                raise ValueError(f"{text!r}: unmatched {letter}")
        elif letter == separator and not open_brackets:
            parts.append(text[begin:i].strip())
            begin = i + 1
    if open_brackets or quote:
        raise ValueError(f"{text!r}: missing {quote or open_brackets[-1]}")
    return [*parts, text[begin:].strip()]
