"""The figures of a report, as PNG bytes by file name."""

import io
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_jax.experiment.best import Best
from lowrank_jax.experiment.report.arms import CONFIDENCE, Arm, short, text
from lowrank_jax.experiment.report.drawing import default_style
from lowrank_jax.experiment.report.ranks import Ranks
from lowrank_jax.text import count, one_line

# Okabe and Ito's colour-blind-safe colours; the markers distinguish the lines too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#555555")
MARKERS = "osD^vP*Xh"
_WIDEST, _COLUMNS = 60, 40  # characters of a label; panels side by side
_MOST_KERNELS = 300  # of a picture
_AXES = {"params": "parameters", "macs": "multiply-adds per image", "images/s": "images per second in training (measured)"}


def draw(arms: Sequence[Arm], best: Best) -> dict[str, bytes]:
    """The metric that runs were judged by against each cost, and the training curves."""
    with default_style():
        pictures = {f"{best.metric}_{_file(cost)}.png": _against(arms, cost, best) for cost in _AXES}
        pictures["curves.png"] = _curves(arms, best)
        return {**pictures, "ranks.png": _ranks(chosen)} if (chosen := [arm for arm in arms if _chosen(arm)]) else pictures


def _file(cost: str) -> str:
    return "speed" if cost == "images/s" else cost


def _styles(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    labels = list(dict.fromkeys(arm.label for arm in arms if arm.method != "none"))
    styles: dict[str, dict[str, Any]] = {
        label: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "ls": "-" if i < 9 else "--"}
        for i, label in enumerate(labels)
    }
    dense = dict.fromkeys(arm.label for arm in arms if arm.method == "none")
    return {**{label: {"color": "black", "marker": "_", "ls": ":"} for label in dense}, **styles}


def _against(arms: Sequence[Arm], cost: str, best: Best) -> bytes:
    """The metric against a cost: one line per arm over its sizes, with the intervals over seeds as a band."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    for label, style in _styles(arms).items():
        points = sorted((arm for arm in arms if arm.label == label), key=lambda arm: arm.interval(cost).mean)
        at, tops = [arm.interval(cost).mean for arm in points], [arm.interval(f"eval/{best.metric}") for arm in points]
        means, halves = [top.mean for top in tops], [0 if math.isnan(top.half) else top.half for top in tops]
        panel.plot(at, means, label=_plain(label), **style)
        low, high = [m - h for m, h in zip(means, halves, strict=True)], [m + h for m, h in zip(means, halves, strict=True)]
        if len(at) > 1:
            panel.fill_between(at, low, high, color=style["color"], alpha=0.12, lw=0)
        else:
            panel.errorbar(at, means, halves, color=style["color"], capsize=3)
    low, high = panel.get_ylim()
    panel.set(xlabel=_AXES[cost], ylabel=best.title)
    if best.is_fraction:  # intervals may exceed [0, 1]
        panel.set_ylim(max(low, 0), min(high, 1.002))
    sizes = sorted({arm.interval(cost).mean for arm in arms})
    if cost != "images/s" and sizes[0] > 0:
        panel.set_xscale("log")
        ticks = _apart(sizes)
        panel.set_xticks(ticks, [count(round(size)) for size in ticks])
        panel.minorticks_off()
    panel.grid(alpha=0.3)
    spread = any(len(arm.runs) > 1 for arm in arms)
    title = f"mean over seeds, and its\n{CONFIDENCE:.0%} interval (Student's t)" if spread else None
    figure.legend(loc="outside right center", fontsize=8, title=title, title_fontsize=8)
    return _png(figure)


def _apart(sizes: Sequence[float]) -> list[float]:
    """Of sorted sizes those whose labels have room on a logarithmic axis: the largest, and what is a tenth of it away."""
    least = (sizes[-1] / sizes[0]) ** 0.1
    kept = [sizes[-1]]
    for size in reversed(sizes[:-1]):
        if size * least <= kept[-1]:
            kept.append(size)
    return kept[::-1]


def _curves(arms: Sequence[Arm], best: Best) -> bytes:
    """Training loss and the evaluated metric by step, one column per size; bands from the lowest seed to the highest."""
    found = list(dict.fromkeys(arm.size for arm in arms if arm.size)) or [()]
    sizes = found[:_COLUMNS]
    figure = Figure(figsize=(2.2 + 3.4 * len(sizes), 6), layout="constrained")
    panels = figure.subplots(2, len(sizes), squeeze=False, sharex=True, sharey="row")
    if len(sizes) < len(found):
        figure.suptitle(f"the first {len(sizes)} of {len(found)} sizes")
    styles = _styles(arms)
    for column, size in enumerate(sizes):
        for arm in (arm for arm in arms if arm.size in (size, ())):
            style = {**styles[arm.label], "marker": ""}
            _curve(panels[0, column], arm, "train/loss", style)
            _curve(panels[1, column], arm, f"eval/{best.metric}", style)
        panels[0, column].set(title=_plain(", ".join(f"{short(key)} {text(value)}" for key, value in size)))
        if panels[0, column].lines:
            panels[0, column].set_yscale("log")
        panels[1, column].set(xlabel="step")
    panels[0, 0].set(ylabel="training loss")
    panels[1, 0].set(ylabel=best.title)
    spread = any(len(arm.runs) > 1 for arm in arms)
    handles = {label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    title = "mean over seeds; bands from\nthe lowest to the highest" if spread else None
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, title=title, title_fontsize=8)
    return _png(figure)


def _curve(panel: Axes, arm: Arm, name: str, style: dict[str, Any]) -> None:
    by_step: dict[int, list[float]] = {}
    for run in arm.runs.values():
        for step, value in run.curve(name):
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    if not steps:
        return
    panel.plot(steps, [statistics.fmean(by_step[step]) for step in steps], label=_plain(arm.label), lw=1, **style)
    low, high = [min(by_step[step]) for step in steps], [max(by_step[step]) for step in steps]
    panel.fill_between(steps, low, high, color=style["color"], alpha=0.1, lw=0)
    panel.grid(alpha=0.3)


def _chosen(arm: Arm) -> Ranks | None:
    """The ranks of the first seed that has any."""
    return next((ranks for _, run in sorted(arm.runs.items()) if (ranks := run.ranks)), None)


def _ranks(arms: Sequence[Arm]) -> bytes:
    """The ranks that were chosen, a line for each arm over the network's kernels; dense kernels lie on the top line."""
    lines: dict[tuple[tuple[str, int | None], ...], list[Arm]] = {}
    for arm in arms:
        lines.setdefault(tuple((_chosen(arm) or {}).items()), []).append(arm)
    shown = dict(list(lines.items())[: len(COLORS)])
    names = list(dict.fromkeys(name for ranks in shown for name, _ in ranks))[:_MOST_KERNELS]
    figure = Figure(figsize=(max(8.0, 3.5 + 0.16 * len(names)), 5.5), layout="constrained")
    panel = figure.subplots()
    top = 2 * max((rank for ranks in shown for _, rank in ranks if rank), default=1)
    for (ranks, alike), color, marker in zip(shown.items(), COLORS, MARKERS, strict=False):
        known = dict(ranks)
        places = [place for place, name in enumerate(names) if name in known]
        heights = [known[names[place]] or top for place in places]
        panel.plot(places, heights, label=_of_alike(alike), color=color, marker=marker, ms=4, lw=0.7)
    panel.set(yscale="log", ylabel="rank")
    ticks = [2**power for power in range(top.bit_length()) if 2**power <= top / 2]
    panel.set_yticks([*ticks, top], [*map(count, ticks), "dense"])
    panel.set_xticks(range(len(names)), [_plain(name.removesuffix("/kernel")) for name in names], rotation=90, fontsize=6)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if len(shown) < len(lines):
        panel.set(title=f"the first {len(shown)} of {len(lines)} choices of ranks")
    figure.legend(loc="outside upper left", fontsize=8)
    return _png(figure)


def _of_alike(arms: Sequence[Arm]) -> str:
    """The name of a line of the picture of ranks: its first arm, and how many others have the same ranks."""
    first, *others = arms
    size = ", ".join(f"{short(key)} {text(value)}" for key, value in first.size)
    return _plain(f"{size}, {first.label}") + (f" and {len(others)} more" if others else "")


def _plain(label: str) -> str:
    """A label as it is: "$" would begin a formula, and a label that begins with "_" would be left out."""
    text = one_line(label).replace("$", r"\$")
    text = f" {text}" if text.startswith("_") else text
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():  # of letters that the font does not have, and of panels too small for their labels
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, dpi=120)
    return file.getvalue()
