"""Figures as matplotlib makes them by itself: a matplotlibrc in the current folder, which could start LaTeX, does not count."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """A context in which figures are made and drawn."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield
