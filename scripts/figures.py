"""The theory's figures: the kernel projection's risk and its gap to spectral initialisation, and learning from samples.

    python -m scripts.figures                    # all of them into docs/results/theory: an hour or more on two cores
    python -m scripts.figures risk gap           # some of them: risk, gap, samples, success, time, sizes
    python -m scripts.figures success --redraw   # the picture anew, from the CSV file that is there
    python -m scripts.figures --small            # every figure of a few small cases into runs/theory, in some minutes

Every figure is a PNG and a CSV file. Interrupted, the same command goes on where it was: until a figure is computed, what there
is of it is in its .partial file.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from lowrank_jax import projection
from lowrank_jax.experiment.report.arms import Interval
from lowrank_jax.experiment.report.figures import COLORS, MARKERS
from lowrank_jax.experiment.workdir.writer import duration
from lowrank_jax.projection import ablations
from lowrank_jax.theory import (
    ReluNetwork,
    SampleError,
    draw_network,
    draw_samples,
    gaussian_gap,
    learn_relu_network,
    relative_gap,
    risk_bound,
    sampled_gap,
    start_from_moments,
)

ROOT = pathlib.Path(__file__).parent.parent
OUT, SMALL_OUT = ROOT / "docs" / "results" / "theory", ROOT / "runs" / "theory"
ENOUGH = 1e-6  # a relative function error at which a network counts as learned
BOUND = "no layer has less"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One figure: `cases` to compute, `run` to make rows of one, `draw` to make a picture of all rows, `tell` a line or two."""

    cases: Sequence[Any]
    run: Callable[..., list[Row]]
    draw: Callable[[list[Row]], Figure]
    tell: Callable[[list[Row]], str]


# --- 1: relative risk by rank ---


def risk_cases(small: bool) -> list[tuple[Any, ...]]:
    ranks, seeds = ((1, 4), 2) if small else ((1, 2, 3, 4, 6, 8, 12, 16, 24, 32), 5)
    return list(itertools.product(("gaussian", "power law"), [16 if small else 64], ranks, range(seeds)))


def risk_of(kind: str, n: int, rank: int, seed: int) -> list[Row]:
    w = matrix(kind, n, 2 * n, seed)
    whole = projection.risk(w, 0 * w)
    factors = {
        "spectral": projection.spectral(w, rank),
        **{name: projection.kernel_projection(w, rank, subspace=name) for name in ("top", "search", "refine")},
        "random subspace": ablations.random_subspace(jax.random.key(seed + 100), w, rank),
    }
    risks = {name: float(projection.risk(w, u @ v) / whole) for name, (u, v) in factors.items()}
    risks[BOUND] = float(risk_bound(w, rank) / whole)
    return [{"matrix": kind, "n": n, "m": 2 * n, "rank": rank, "seed": seed, "method": k, "risk": v} for k, v in risks.items()]


def matrix(kind: str, n: int, m: int, seed: int) -> jax.Array:
    """`[n, m]`: i.i.d. Gaussian, or with singular values that fall like 1/i as those of trained kernels do."""
    w = jax.random.normal(jax.random.key(seed), (n, m))
    if kind == "gaussian":
        return w
    left, _, right = jnp.linalg.svd(w, full_matrices=False)
    return left / jnp.arange(1, n + 1) @ right


def draw_risk(rows: list[Row]) -> Figure:
    figure, panels = new_figure(2, rows=2)
    bounds = {(row["matrix"], row["rank"], row["seed"]): row["risk"] for row in rows if row["method"] == BOUND}
    over = [row | {"risk": row["risk"] / bounds[row["matrix"], row["rank"], row["seed"]]} for row in rows]
    for column, kind in enumerate(("gaussian", "power law")):
        for i, (method, part) in enumerate(groups(rows, "method", matrix=kind)):
            style = {"ls": "--", "marker": ""} if method == BOUND else {}
            line(panels[0, column], part, "rank", "risk", method, i, **style)
        for i, (method, part) in enumerate(groups(over, "method", matrix=kind)):
            if method not in (BOUND, "random subspace"):
                line(panels[1, column], part, "rank", "risk", method, i)
        panels[0, column].set(title=f"{kind}, {rows[0]['n']} x {rows[0]['m']}")
        panels[1, column].set(xlabel="rank", xscale="log")
        panels[1, column].set_xticks(ranks := sorted({row["rank"] for row in rows}), map(str, ranks), fontsize=8)
        panels[1, column].minorticks_off()
    panels[0, 0].set(ylabel="risk relative to that of Y = 0")
    panels[1, 0].set(ylabel="risk over the bound")
    panels[0, 1].legend(fontsize=8)
    return figure


def tell_risk(rows: list[Row]) -> str:
    lines = []
    for (kind, rank), part in groups_of(rows, "matrix", "rank"):
        means = {method: statistics.fmean(row["risk"] for row in rows) for method, rows in groups(part, "method")}
        lines.append(f"  {kind:9} rank {rank:2}  " + "  ".join(f"{method} {mean:.4f}" for method, mean in means.items()))
    return "\n".join(lines)


# --- 2: the gap to spectral initialisation ---

POWERS = {"m = n": 1.0, "m = n^1.5": 1.5, "m = n^2": 2.0}


def gap_cases(small: bool) -> list[tuple[Any, ...]]:
    n, sizes, seeds = (16, (8, 16), 2) if small else (64, (8, 16, 32, 64, 128, 256), 5)
    ranks = [rank for rank in (1, 2, 4, 8, 16, 32, 64) if rank <= n]
    by_rank = itertools.product(["rank"], POWERS, [n], ranks, range(seeds))
    return [*by_rank, *itertools.product(["n"], POWERS, sizes, [2], range(seeds))]


def gap_of(against: str, power: str, n: int, rank: int, seed: int) -> list[Row]:
    m = round(n ** POWERS[power])
    key = jax.random.fold_in(jax.random.key(seed), n)
    w = jax.random.normal(key, (n, m), jnp.float32)
    row = {"against": against, "width": power, "n": n, "m": m, "rank": rank, "seed": seed, "gap": float(relative_gap(w, rank))}
    inputs = jax.random.fold_in(jax.random.key(m + 1000), rank)
    # At full rank there is no gap, and sampling would show the rounding.
    sampled = sampled_gap(inputs, w, rank, samples=2 * 10**5) if seed == 0 and m <= 4096 and rank < n else None
    return [row | {"sampled": sampled.mean if sampled else "", "half": sampled.half if sampled else ""}]


def draw_gap(rows: list[Row]) -> Figure:
    figure, panels = new_figure(2)
    for panel, against in zip(panels, ("rank", "n"), strict=True):
        for i, (power, part) in enumerate(groups(rows, "width", against=against)):
            line(panel, part, against, "gap", power, i)
            sampled = [row for row in part if row["sampled"] != ""]
            panel.errorbar(
                [row[against] for row in sampled], [row["sampled"] for row in sampled], [row["half"] for row in sampled],
                fmt="x", color="black", capsize=3, label="one draw, sampled, 95 %" if not i else None,
            )  # fmt: skip
        at = sorted({(row["rank"], row["n"]) for row in rows if row["against"] == against})
        panel.plot([p[against == "n"] for p in at], [gaussian_gap(*p) for p in at], "k:", label="(h(√(r/n)) - √(r/n))²")
        fixed = f"rank {at[0][0]}" if against == "n" else f"n = {at[0][1]}"
        panel.set(title=fixed, xlabel="rank" if against == "rank" else "input dimension n", xscale="log")
    panels[0].set(ylabel="risk of spectral less that of projection, relative")
    panels[1].legend(fontsize=8)
    return figure


def tell_gap(rows: list[Row]) -> str:
    lines = []
    for (against, power), part in groups_of(rows, "against", "width"):
        points = [f"{at}: {mean_and_half([row['gap'] for row in some])}" for at, some in groups(part, against)]
        lines.append(f"  against {against}, {power}: " + ", ".join(points))
    sampled = [row for row in rows if row["sampled"] != ""]
    inside = sum(abs(row["sampled"] - row["gap"]) <= row["half"] for row in sampled)
    return "\n".join([*lines, f"  {inside} of {len(sampled)} sampled gaps have the closed form in their 95 % interval"])


# --- 3: excess risk by samples ---

LEARNERS = ("hidden layer observed", "outputs unknown, moments alone", "outputs unknown, learned")


def samples_cases(small: bool) -> list[tuple[Any, ...]]:
    counts, seeds = ((100, 4000), 2) if small else ((30, 36, 42, 60, 100, 200, 400, 1000, 4000, 16000, 64000, 256000), 10)
    return list(itertools.product(LEARNERS, [(20, 10, 10), (20, 10, 1)], counts, range(seeds)))


def samples_of(learner: str, size: tuple[int, int, int], count: int, seed: int) -> list[Row]:
    if learner == LEARNERS[0] and size[2] == 1:
        return []
    observed = learner == LEARNERS[0]
    network = draw_network(jax.random.key(seed), *size)
    x, y = draw_samples(jax.random.key(seed + 1000), network, count)
    key = jax.random.key(seed + 2000)
    rank, excess, converged, reason = 4, float("nan"), "", ""
    try:
        if observed:
            network = dataclasses.replace(network, a=jnp.eye(size[1]))
            learned = learn_relu_network(x, network(x), size[1], key=key, hidden_observed=True)
        elif learner == LEARNERS[1]:
            learned = start_from_moments(x, y, size[1], key=key)
        else:
            learned = learn_relu_network(x, y, size[1], key=key)
        excess, converged = excess_risk(network, learned, rank), learned.converged
    except SampleError as refused:
        reason = str(refused)
    row: Row = {"learner": learner, **named(size), "rank": rank, "samples": count, "seed": seed}
    return [row | {"excess": excess, "converged": converged, "refused": reason}]


def excess_risk(network: ReluNetwork, learned: ReluNetwork, rank: int) -> float:
    """Of the learned W's projection in place of the true W, over that of the true one's projection; relative to R(0).

    On the leading singular subspace: `refine` ends in one of several maxima, and rounding alone may decide in which.
    """
    found = matched(network, learned)
    best, ours = (projection.kernel_projection(w, rank) for w in (network.w, found))
    risks = [projection.relative_risk(network.w, u @ v) for u, v in (ours, best)]
    return float(risks[0] - risks[1])


def matched(network: ReluNetwork, learned: ReluNetwork) -> jax.Array:
    """The learned W, its columns in the order of the true ones: alike in direction and in row of A."""
    alike = [np.asarray(part / jnp.linalg.norm(part, axis=0)) for part in (network.w, learned.w)]
    cosines = (alike[0].T @ alike[1]) + np.asarray(network.a @ learned.a.T)
    return learned.w[:, linear_sum_assignment(-cosines)[1]]


def draw_samples_figure(rows: list[Row]) -> Figure:
    figure, panels = new_figure(2)
    rows = [row | {"excess": max(abs(row["excess"]), 1e-18)} for row in rows if not math.isnan(row["excess"])]
    for panel, outputs in zip(panels, (10, 1), strict=True):
        for learner, part in groups(rows, "learner", outputs=outputs):
            median_line(panel, part, "samples", "excess", learner, LEARNERS.index(learner))
            if learner == LEARNERS[1]:
                points = upper_half(medians(part, "samples", "excess"))
                slope, fitted = power_law(points)
                panel.plot([at for at, _ in points], fitted, "k:", label="power law")
                panel.annotate(f"slope {slope:.2f}", points[len(points) // 2], (0, 10), textcoords="offset points", fontsize=8)
        panel.set(title=f"n = 20, m = 10, outputs {outputs}, rank 4", xlabel="samples", xscale="log", yscale="log")
    panels[0].set(ylabel="|excess risk| / risk of Y = 0")
    panels[0].legend(fontsize=8)
    return figure


def medians(rows: list[Row], at: str, value: str) -> list[tuple[float, float]]:
    return [(point, statistics.median(row[value] for row in part)) for point, part in groups(rows, at)]


def power_law(points: list[tuple[float, float]]) -> tuple[float, np.ndarray]:
    """The exponent of a power law fitted to points (x, y), and its y there."""
    x, y = np.log(np.array(points)).T
    if len(x) < 2:
        return float("nan"), np.exp(y)
    exponent, offset = np.polyfit(x, y, 1)
    return float(exponent), np.exp(exponent * x + offset)


def upper_half(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points[len(points) // 2 :] if len(points) > 3 else points


def tell_samples(rows: list[Row]) -> str:
    lines = []
    for (learner, outputs), part in groups_of(rows, "learner", "outputs"):
        points = []
        for count, some in groups(part, "samples"):
            known = [row["excess"] for row in some if not math.isnan(row["excess"])]
            middle = f"{statistics.median(known):.1e}, at most {max(known):.1e}" if known else "-"
            refused, left = len(some) - len(known), sum(row["converged"] is False for row in some)
            told = f" ({refused} refused)" if refused else ""
            told += f" ({left} not converged)" if left and learner != LEARNERS[1] else ""
            points.append(f"{count}: {middle}{told}")
        lines.append(f"  {learner}, outputs {outputs}: " + ", ".join(points))
        known = [row for row in part if not math.isnan(row["excess"])]
        if learner == LEARNERS[1]:
            lines.append(f"    slope of the upper half: {power_law(upper_half(medians(known, 'samples', 'excess')))[0]:.2f}")
    return "\n".join(lines)


# --- 4: how often it succeeds ---


def success_cases(small: bool) -> list[tuple[Any, ...]]:
    sizes = [(8, 4, 4)] if small else [(8, 4, 4), (8, 8, 8), (16, 8, 8), (16, 16, 16), (32, 8, 8), (8, 4, 1), (16, 8, 1)]
    counts = (200, 2000) if small else (100, 200, 400, 800, 1600, 3200, 12800)
    cases = itertools.product(sizes, counts, range(2 if small else 20))
    # Fewer than some samples a neuron are hopeless, and to see that takes longest.
    return [(size, count, seed) for size, count, seed in cases if count >= size[1] * (12 if size[2] > 1 else 96)]


def success_of(size: tuple[int, int, int], count: int, seed: int) -> list[Row]:
    network = draw_network(jax.random.key(seed), *size)
    x, y = draw_samples(jax.random.key(seed + 1000), network, count)
    row: Row = {**named(size), "samples": count, "seed": seed}
    begin = time.perf_counter()
    try:
        learned = learn_relu_network(x, y, size[1], key=jax.random.key(seed + 2000))
    except SampleError as refused:
        return [row | {"error": 1.0, "converged": "", "seconds": time.perf_counter() - begin, "refused": str(refused)}]
    seconds = time.perf_counter() - begin
    error = function_error(network, learned, seed)
    return [row | {"error": error, "converged": learned.converged, "seconds": seconds, "refused": ""}]


def function_error(network: ReluNetwork, learned: ReluNetwork, seed: int) -> float:
    """E |f - f'|² over the variance of f, on fresh samples."""
    x, y = draw_samples(jax.random.key(seed + 3000), network, 20000)
    return float(jnp.sum((y - learned(x)) ** 2) / jnp.sum((y - y.mean(axis=0)) ** 2))


def draw_success(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    sizes, counts = list(dict.fromkeys(map(size_of, rows))), sorted({row["samples"] for row in rows})
    rates = np.array([[rate(rows, size, count) for count in counts] for size in sizes])
    image = panel.imshow(rates, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(rates):
        refused = sum(row["refused"] != "" for row in rows if size_of(row) == sizes[i] and row["samples"] == counts[j])
        told = "" if math.isnan(value) else f"{value:.2f}" + (f"\n{refused} refused" if refused else "")
        panel.text(j, i, told, ha="center", va="center", fontsize=8, color="white" if value < 0.6 else "black")
    panel.set_xticks(range(len(counts)), [str(count) for count in counts])
    panel.set_yticks(range(len(sizes)), [f"n {n}, m {m}, outputs {k}" for n, m, k in sizes])
    panel.set(xlabel="samples", title=f"share of {len({row['seed'] for row in rows})} networks learned to 1e-6")
    figure.colorbar(image)
    return figure


def size_of(row: Row) -> tuple[int, int, int]:
    return row["n"], row["m"], row["outputs"]


def rate(rows: list[Row], size: tuple[int, int, int], count: int) -> float:
    learned = [row["error"] <= ENOUGH for row in rows if size_of(row) == size and row["samples"] == count]
    return statistics.fmean(learned) if learned else float("nan")


def tell_success(rows: list[Row]) -> str:
    lines = []
    for size, part in groups_of(rows, "n", "m", "outputs"):
        counts = {count: sum(row["error"] <= ENOUGH for row in some) for count, some in groups(part, "samples")}
        lines.append(f"  {size}: " + "  ".join(f"{count}: {learned}" for count, learned in counts.items()))
    wrong = sum(row["converged"] is True and row["error"] > ENOUGH for row in rows)
    return "\n".join([*lines, f"  called converged and wrong: {wrong} of {len(rows)}"])


# --- 5: running time ---


def time_cases(small: bool) -> list[tuple[Any, ...]]:
    sizes = (4, 8) if small else (8, 12, 16, 24, 32, 48, 64)
    samples = 2000 if small else 100000
    together = [("n = m = outputs", (n, n, n), samples) for n in sizes]
    widths = [("m = outputs", (sizes[-1], m, m), samples) for m in sizes]
    inputs = [("n", (n, sizes[0], sizes[0]), samples) for n in sizes]
    return [(*case, turn) for case in [*together, *widths, *inputs] for turn in range(2 if small else 4)]


def time_of(varied: str, size: tuple[int, int, int], count: int, turn: int) -> list[Row]:
    network = draw_network(jax.random.key(turn), *size)
    x, y = jax.block_until_ready(draw_samples(jax.random.key(turn + 1000), network, count))
    begin, cpu = time.perf_counter(), time.process_time()
    learned = learn_relu_network(x, y, size[1], key=jax.random.key(turn + 2000))
    took = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    # The first turn compiles.
    return [{"varied": varied, **named(size), "samples": count, "turn": turn, **took, "converged": learned.converged}]


def along(varied: str) -> str:
    """The column that tells the sizes of a series apart."""
    return "m" if varied == "m = outputs" else "n"


def draw_time(rows: list[Row]) -> Figure:
    figure, panels = new_figure(1)
    for i, (varied, part) in enumerate(groups([row for row in rows if row["turn"]], "varied")):
        at = along(varied)
        exponent, _ = power_law(upper_half(medians(part, at, "cpu_seconds")))
        others = {"n": ", m = 8", "m = outputs": ", n = 64"}.get(varied, "")
        median_line(panels[0], part, at, "cpu_seconds", f"{varied}{others}: exponent {exponent:.1f}", i)
    panels[0].set(
        xlabel="n or m", ylabel="CPU-seconds, compiled", xscale="log", yscale="log", title=f"{rows[0]['samples']} samples"
    )
    panels[0].legend(fontsize=8)
    return figure


def tell_time(rows: list[Row]) -> str:
    lines = []
    for varied, part in groups([row for row in rows if row["turn"]], "varied"):
        at = along(varied)
        points = medians(part, at, "cpu_seconds")
        told = ", ".join(f"{size}: {seconds:.2f}" for size, seconds in points)
        lines.append(f"  {varied}: CPU-seconds {told}; exponent of the upper half {power_law(upper_half(points))[0]:.1f}")
    return "\n".join(lines)


# --- 6: sizes that have to be learned ---

# n, m, outputs; two counts of samples, the first one that of an earlier prototype; seeds.
SIZES = (
    ((10, 5, 5), (60_000, 2_000), 20),
    ((20, 10, 1), (400_000, 50_000), 20),
    ((20, 10, 10), (100_000, 5_000), 20),
    ((20, 20, 20), (200_000, 10_000), 20),
    ((40, 40, 40), (500_000, 50_000), 8),
    ((64, 32, 32), (500_000, 50_000), 8),
    ((64, 64, 64), (1_000_000, 200_000), 2),
)


def sizes_cases(small: bool) -> list[tuple[Any, ...]]:
    sizes = [((10, 5, 5), (2_000,), 2)] if small else SIZES
    return [(size, count, seed) for size, counts, seeds in sizes for count in counts for seed in range(seeds)]


def draw_sizes(rows: list[Row]) -> Figure:
    figure, panels = new_figure(2, shared=False)
    for i, (size, part) in enumerate(groups_of(rows, "n", "m", "outputs")):
        for panel, value in zip(panels, ("seconds", "error"), strict=True):
            panel.plot([row["samples"] for row in part], [row[value] for row in part], ".", color=COLORS[i], label=f"{size}")
            panel.set(xlabel="samples", xscale="log", yscale="log")
    panels[0].set(ylabel="seconds (the first of each size compiles)")
    panels[1].set(ylabel="relative function error")
    panels[1].legend(fontsize=8, title="n, m, outputs", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def tell_sizes(rows: list[Row]) -> str:
    lines = ["  n, m, outputs, samples: learned to 1e-6; largest error; median and largest seconds"]
    for case, part in groups_of(rows, "n", "m", "outputs", "samples"):
        learned, seconds = sum(row["error"] <= ENOUGH for row in part), [row["seconds"] for row in part]
        worst = max(row["error"] for row in part)
        lines.append(
            f"  {case}: {learned}/{len(part)}; {worst:.0e}; {statistics.median(seconds):.2f} s and {max(seconds):.2f} s"
        )
    return "\n".join(lines)


# --- rows, lines, files ---


def named(size: tuple[int, int, int]) -> Row:
    return dict(zip(("n", "m", "outputs"), size, strict=True))


def groups(rows: list[Row], by: str, **fixed: Any) -> Iterator[tuple[Any, list[Row]]]:
    """Rows by the value of a column, in order of appearance, of those with the fixed ones."""
    rows = [row for row in rows if all(row[name] == value for name, value in fixed.items())]
    for value in dict.fromkeys(row[by] for row in rows):
        yield value, [row for row in rows if row[by] == value]


def groups_of(rows: list[Row], *by: str) -> Iterator[tuple[Any, list[Row]]]:
    for value in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        yield value, [row for row in rows if tuple(row[name] for name in by) == value]


def new_figure(columns: int, rows: int = 1, *, shared: bool = True) -> tuple[Figure, np.ndarray]:
    """A figure and its panels `[rows, columns]`, or `[columns]` of a single row."""
    figure = Figure(figsize=(1 + 4.6 * columns, 1 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row" if shared else False)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    return figure, panels if rows > 1 else panels[0]


def line(panel: Axes, rows: list[Row], at: str, value: str, label: str, i: int, **style: Any) -> None:
    """Means over seeds, and their 95 % intervals as a band."""
    intervals = {point: Interval.of(row[value] for row in part) for point, part in groups(rows, at)}
    x, means, halves = (np.array(c) for c in zip(*((p, i.mean, i.half) for p, i in intervals.items()), strict=True))
    panel.plot(x, means, label=label, **{"color": COLORS[i], "marker": MARKERS[i], "ms": 4, **style})
    panel.fill_between(x, means - halves, means + halves, color=COLORS[i], alpha=0.15, lw=0)


def median_line(panel: Axes, rows: list[Row], at: str, value: str, label: str, i: int) -> None:
    """Medians over seeds, from the least to the largest as a band."""
    x, middle = zip(*medians(rows, at, value), strict=True)
    ranges = [[row[value] for row in part] for _, part in groups(rows, at)]
    panel.plot(x, middle, label=label, color=COLORS[i], marker=MARKERS[i], ms=4)
    panel.fill_between(x, [min(part) for part in ranges], [max(part) for part in ranges], color=COLORS[i], alpha=0.15, lw=0)


def mean_and_half(values: list[float]) -> str:
    found = Interval.of(values)
    return f"{found.mean:.4f} ± {found.half:.4f}"


def write_csv(path: pathlib.Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: pathlib.Path) -> list[Row]:
    with path.open(newline="") as file:
        return [{name: parsed(value) for name, value in row.items()} for row in csv.DictReader(file)]


def parsed(value: str) -> Any:
    for read in (int, float):
        try:
            return read(value)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(value, value)


def compute(name: str, job: Job, partial: pathlib.Path) -> list[Row]:
    """The rows of all cases, those of an earlier start out of the partial file, which holds a case and its rows a line."""
    whole = partial.read_text().split("\n")[:-1] if partial.exists() else []
    partial.write_text("".join(f"{line}\n" for line in whole))  # a line that a kill cut short would spoil the next one
    done = {json.dumps(line["case"]): line["rows"] for line in map(json.loads, whole)}
    todo = [case for case in job.cases if json.dumps(case) not in done]
    if done:
        print(f"{name}: {len(job.cases) - len(todo)} of {len(job.cases)} cases are in {partial}; without it all are computed")
    begin = time.monotonic()
    for i, case in enumerate(todo):
        rows = done[json.dumps(case)] = job.run(*case)
        with partial.open("a") as file:
            file.write(json.dumps({"case": case, "rows": rows}) + "\n")
        spent = time.monotonic() - begin
        left = spent / (i + 1) * (len(todo) - i - 1)
        print(f"\r{name} [{i + 1}/{len(todo)}] {duration(spent)}, eta {duration(left)}   ", end="", flush=True)
    print()
    return [row for case in job.cases for row in done[json.dumps(case)]]


def jobs(small: bool) -> dict[str, Job]:
    return {
        "risk": Job(risk_cases(small), risk_of, draw_risk, tell_risk),
        "gap": Job(gap_cases(small), gap_of, draw_gap, tell_gap),
        "samples": Job(samples_cases(small), samples_of, draw_samples_figure, tell_samples),
        "success": Job(success_cases(small), success_of, draw_success, tell_success),
        "time": Job(time_cases(small), time_of, draw_time, tell_time),
        "sizes": Job(sizes_cases(small), success_of, draw_sizes, tell_sizes),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=f"of {', '.join(jobs(True))}; all if none is named")
    parser.add_argument("--small", action="store_true", help="few and small cases")
    parser.add_argument("--redraw", action="store_true", help="compute nothing: draw what the CSV files hold")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write to; default: docs/results/theory, small: runs/theory")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in jobs(True)]
    if unknown:
        parser.error(f"unknown figure {unknown[0]!r}; there are {', '.join(jobs(True))}")
    out = args.out or (SMALL_OUT if args.small else OUT)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with jax.enable_x64(True):
            for name in args.names or jobs(True):
                make(name, jobs(args.small)[name], out, args.redraw, args.small)
    except OSError as error:
        sys.exit(f"{error.filename or out}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)


def make(name: str, job: Job, out: pathlib.Path, redraw: bool, small: bool) -> None:
    if not redraw:
        partial = out / f"{name}.partial"
        write_csv(out / f"{name}.csv", compute(name, job, partial))
        partial.unlink()
    rows = read_csv(out / f"{name}.csv")
    try:
        figure = job.draw(rows)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        sys.exit(f"{out / name}.csv: not what this figure is drawn from ({type(error).__name__}: {error})")
    command = f"python -m scripts.figures {name}" + (" --small" if small else "")
    figure.supxlabel(command, fontsize=7, x=0.01, ha="left", family="monospace")
    figure.savefig(out / f"{name}.png", dpi=120)
    print(f"{out / name}.png, .csv\n{job.tell(rows)}")


if __name__ == "__main__":
    main()
