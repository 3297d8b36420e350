"""Regular expressions over names, in Python's syntax, matched in a time that the name's length bounds.

Python's own matcher goes back for every choice that it made, so that `(.*)*x` takes longer than anybody waits.  This one keeps
the set of all places that a match may have come to.  References to groups cannot be
matched without going back, and are refused.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from lowrank_jax.text import shown

Places = frozenset[int]
Step = Callable[[str, Places], Places]
"""From the places in a text where a part of a pattern may begin, to those where it may end."""


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Whether a text as a whole matches.

    Raises:
      ValueError: it is not a regular expression, or one that would have to go back.
    """
    try:
        return _compiled(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"rule {shown(pattern)} is not a regular expression: {reason}") from None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Callable[[str], bool]:
    with warnings.catch_warnings(action="ignore"):  # of what a later Python may read otherwise
        tree = _parser.parse(pattern)
    step = _sequence(tree, tree.state.flags)

    @functools.lru_cache(maxsize=2**14)
    def matches(text: str) -> bool:
        return len(text) in step(text, frozenset({0}))

    return matches


def _sequence(nodes: Iterable[tuple[Any, Any]], flags: int) -> Step:
    steps = [_step(kind, value, flags) for kind, value in nodes]

    def step(text: str, places: Places) -> Places:
        for each in steps:
            places = each(text, places)
        return places

    return step


def _step(kind: Any, value: Any, flags: int) -> Step:
    if kind in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN):
        return _character(kind, value, flags)
    if kind is _constants.AT:
        condition = _python(kind, value, flags)
        return lambda text, places: frozenset(place for place in places if condition.match(text, place))
    if kind is _constants.BRANCH:
        branches = [_sequence(branch, flags) for branch in value[1]]
        return lambda text, places: frozenset().union(*(branch(text, places) for branch in branches))
    if kind is _constants.SUBPATTERN:
        return _sequence(value[3], _compiler._combine_flags(flags, value[1], value[2]))
    if kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
        return _repeat(_sequence(value[2], flags), *value[:2])
    if kind in (_constants.ASSERT, _constants.ASSERT_NOT):
        return _look(_sequence(value[1], flags), ahead=value[0] > 0, wanted=kind is _constants.ASSERT)
    raise re.error(f"{_UNSUPPORTED.get(str(kind), 'a part of it')} is not supported")


_UNSUPPORTED = {
    "GROUPREF": "a reference to a group",
    "GROUPREF_EXISTS": "a reference to a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
}


def _python(kind: Any, value: Any, flags: int) -> re.Pattern[str]:
    """One node of a pattern by itself, which Python matches without going back."""
    return _compiler.compile(_parser.SubPattern(_parser.State(), [(kind, value)]), flags)


def _character(kind: Any, value: Any, flags: int) -> Step:
    accepted = functools.lru_cache(maxsize=1024)(_python(kind, value, flags).fullmatch)
    return lambda text, places: frozenset(place + 1 for place in places if accepted(text[place : place + 1]))


def _look(part: Step, *, ahead: bool, wanted: bool) -> Step:
    """Keeps the places where a part can begin, or end, or those where it cannot."""

    @functools.lru_cache(maxsize=1)
    def known(text: str) -> dict[int, bool]:
        """Where it can begin, as far as was asked: parts that look ahead inside one another would ask ever more often."""
        return {}

    def step(text: str, places: Places) -> Places:
        if ahead:
            begins = known(text)
            for place in places - begins.keys():
                begins[place] = bool(part(text, frozenset({place})))
            found = frozenset(place for place in places if begins[place])
        else:
            found = places & part(text, frozenset(range(len(text) + 1)))
        return found if wanted else places - found

    return step


def _repeat(once: Step, least: int, most: int) -> Step:
    def step(text: str, places: Places) -> Places:
        for _ in range(least):
            before, places = places, once(text, places)
            if places in (before, frozenset()):
                break
        reached = new = places
        for _ in range(most - least):
            new = once(text, new) - reached
            if not new:
                break
            reached |= new
        return reached

    return step
