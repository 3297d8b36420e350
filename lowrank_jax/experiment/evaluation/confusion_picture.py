"""A confusion matrix as a picture."""

import io
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.evaluation.classes import Classes
from lowrank_jax.experiment.report.drawing import default_style
from lowrank_jax.text import one_line

FORMATS = (".png", ".svg", ".pdf")
_NAMED, _NUMBERED = 40, 15  # up to so many classes the axes have their names, and the cells their numbers
_LONGEST = 24  # characters of a name
_SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#56B4E9", "#0072B2", "#001f3d"])


def check_name(path: str) -> None:
    """Raises UserError unless the suffix names a format."""
    if pathlib.Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"--confusion: {path} must end in {', '.join(FORMATS)}")


def draw(matrices: Mapping[str, Classes], suffix: str) -> bytes:
    """A panel for each matrix, by its title; a row is a true class, and its shades are shares of the class's examples.

    Of more classes than have names on the axes, the most frequent mistakes are listed below.
    """
    with default_style():
        return _drawn(matrices, suffix)


def _drawn(matrices: Mapping[str, Classes], suffix: str) -> bytes:
    size = len(next(iter(matrices.values())).names)
    side = min(12.0, 4.5 + 0.22 * min(size, _NAMED))
    figure = Figure(figsize=(side * len(matrices), side + (1.5 if size > _NAMED else 0)), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for panel, (title, classes) in zip(panels, matrices.items(), strict=True):
        _panel(panel, title, classes)
    file = io.BytesIO()
    with warnings.catch_warnings():  # of letters that the font does not have, and of panels too small for their labels
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format=suffix.lower().lstrip("."), dpi=150, bbox_inches="tight")
    return file.getvalue()


def _panel(panel: Any, title: str, classes: Classes) -> None:
    share = classes.confusion / np.maximum(classes.counts, 1)[:, None]
    panel.imshow(share, cmap=_SHADES, vmin=0, vmax=1, interpolation="nearest" if len(share) <= 500 else "antialiased")
    panel.set_title(title, parse_math=False)
    panel.set(xlabel="predicted", ylabel="true")
    if len(share) <= _NAMED:
        names = [_short(name) for name in classes.names]
        panel.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        panel.set_yticks(range(len(names)), names, parse_math=False)
    else:
        panel.set_xlabel(f"predicted\n\n{_mistakes(classes)}", parse_math=False)
    if len(share) <= _NUMBERED:
        for true, taken in np.argwhere(classes.confusion):
            often, color = classes.confusion[true, taken], "white" if share[true, taken] > 0.5 else "black"
            panel.text(taken, true, f"{often:,}", ha="center", va="center", color=color, fontsize=8)


def _mistakes(classes: Classes) -> str:
    """The most frequent ones, a line each."""
    names = classes.names
    lines = [f"{_short(names[true])} taken for {_short(names[taken])}: {often:,}" for true, taken, often in classes.confused()]
    return "\n".join(lines)


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
