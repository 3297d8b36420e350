"""What messages to the user are made of."""

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """Of what an error says; its type's name where it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that reads most like `name`; None when there are no candidates."""
    return max(candidates, key=lambda c: difflib.SequenceMatcher(None, name, c).ratio(), default=None)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The clause "; did you mean x?" when a candidate is close, else the list of what is known."""
    candidates = [str(c) for c in candidates]
    close = difflib.get_close_matches(str(name), candidates, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(candidates) or 'none'}"
