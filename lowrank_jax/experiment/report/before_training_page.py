"""The comparison of initialisations as tables, Markdown, JSON and a picture."""

import dataclasses
import io
import json
import os
import pathlib
import statistics
from collections.abc import Sequence

import jax

from lowrank_jax.experiment.config.plan import plan_by_rules
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.report.before_training import Measurement, Settings, left_dense, short_time
from lowrank_jax.experiment.report.blocks import Block, Emphasis, Heading, Paragraph, Picture, Preformatted, Table
from lowrank_jax.experiment.report.budget_curves import BudgetCurve, budget_curves, draw
from lowrank_jax.experiment.report.drawing import default_style
from lowrank_jax.experiment.report.rendering import as_markdown
from lowrank_jax.experiment.workdir import files


def summary(measured: Sequence[Measurement]) -> list[list[str]]:
    """One row per scale and method: means over the seeds, and their ranges."""
    header = ["scale", "method", "mean relative risk", "logit error", "seconds", "compile s"]
    rows = []
    for (scale, method), members in _by_scale_and_method(measured).items():
        rows.append([
            f"{scale:g}",
            method,
            _spread([one.mean_risk for one in members]),
            _spread([one.logit_error for one in members]),
            short_time(statistics.median(one.seconds for one in members)),
            f"{statistics.median(one.compile_seconds for one in members):.1f}",
        ])  # fmt: skip
    return [header, *rows]


def kernel_table(measured: Sequence[Measurement], scale: float, shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """One row per kernel that is factored at a scale: its rank, and each method's relative risk averaged over the seeds."""
    by_method = {method: members for (at, method), members in _by_scale_and_method(measured).items() if at == scale}
    ranks = next(iter(by_method.values()))[0].rank
    rows = [["kernel", "shape", "rank", *by_method]]
    for name, rank in ranks.items():
        risks = [f"{statistics.fmean(one.risk[name] for one in members):.4f}" for members in by_method.values()]
        rows.append([name, "x".join(map(str, shapes[name])), str(rank), *risks])
    return rows


def _by_scale_and_method(measured: Sequence[Measurement]) -> dict[tuple[float, str], list[Measurement]]:
    groups: dict[tuple[float, str], list[Measurement]] = {}
    for one in measured:
        groups.setdefault((one.scale, one.method), []).append(one)
    return groups


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


SUFFIXES = ("md", "json", "budgets.png", "png")
"""Of the files of a report."""


def write(
    measured: Sequence[Measurement], prefix: str, *, command: str, config: Config, settings: Settings
) -> list[pathlib.Path]:
    """Writes the report as PREFIX.md, PREFIX.json, PREFIX.budgets.png and PREFIX.png, and returns their paths."""
    page, data, budgets, picture = (pathlib.Path(f"{prefix}.{suffix}") for suffix in SUFFIXES)
    low_rank = dataclasses.replace(config.lowrank, method=settings.methods[0])  # the config's own may be dense
    low_rank = dataclasses.replace(config, lowrank=low_rank)
    plan, curves = plan_by_rules(low_rank), budget_curves(low_rank)
    shapes, note = {kernel.name: kernel.shape for kernel in plan.kernels}, left_dense(plan)
    by_budget = draw(curves, config.model.name)
    with default_style():
        drawn = _plot(measured, config.model.name)
    blocks: list[Block] = [
        Heading(f"{config.model.name} before training", level=1),
        Preformatted([command]),
        *_reading_aid(config, settings),
        *([Paragraph(f"{note}.")] if note else []),
        Table(summary(measured)),
        Picture(picture.name, drawn, "risk and logit error by scale"),
        Heading("Ranks from a budget"),
        _of_budgets(curves, bounded=bool(note)),
        Picture(budgets.name, by_budget, "what is lost by the budget"),
    ]
    for scale in settings.scales:
        blocks.append(Heading(f"Relative risk of every kernel at scale {scale:g}"))
        blocks.append(Table(kernel_table(measured, scale, shapes)))
    stored = {"command": command, "arms": [dataclasses.asdict(one) for one in measured]}
    stored["budgets"] = [dataclasses.asdict(curve) for curve in curves]
    files.write(page, as_markdown(blocks).encode())
    files.write(data, (json.dumps(stored, indent=1, allow_nan=False) + "\n").encode())
    files.write(budgets, by_budget)
    files.write(picture, drawn)
    return [page, data, budgets, picture]


def _of_budgets(curves: Sequence[BudgetCurve], *, bounded: bool) -> Paragraph:
    energies = " The energies of rules, which trained kernels alone tell, bound no rank here." if bounded else ""
    return Paragraph(
        f"What the network loses (lowrank.budget.objective={curves[0].objective}) within each budget, from the smallest"
        " possible one to the dense network: with the ranks that are chosen for it, and with one scale for all kernels. By the"
        f" shapes of kernels alone, under Gaussian inputs.{energies}"
    )


def _reading_aid(config: Config, settings: Settings) -> list[Paragraph]:
    """The machine, the seeds, and what the columns mean."""
    last, moments = config.seed + settings.seeds - 1, config.lowrank.moment_batches
    seeds = f"Seeds {config.seed} to {last}: means and ranges." if settings.seeds > 1 else f"Seed {config.seed}."
    inputs = f"inputs with the second moments captured on {moments} batches" if moments else "Gaussian inputs"
    machine = f"{jax.device_count()} {jax.devices()[0].platform} device(s), {os.cpu_count()} cores"
    return [
        Paragraph(f"{machine}, jax {jax.__version__}, float32. {seeds}"),
        Paragraph(
            Emphasis("Mean relative risk"),
            f": R(Y)/R(0) of a kernel under {inputs}, in closed form; the mean over the factored kernels.",
        ),
        Paragraph(
            Emphasis("Logit error"),
            f": ‖dense - low-rank logits‖²/‖dense logits‖² on {settings.batch_size} images of {settings.images}, after "
            "subtracting each logit's mean over the images. BatchNorm uses batch statistics, as in the first training step. "
            "A network with the same output for all images has error 1, an unrelated network with logits of the same size 2.",
        ),
        Paragraph(
            Emphasis("Seconds"), ": to factor all kernels with the compiled program, the minimum of up to three runs; ",
            Emphasis("compile s"), ": to compile that program.",
        ),
    ]  # fmt: skip


def _plot(measured: Sequence[Measurement], title: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    measures = {"mean relative risk": lambda one: one.mean_risk, "logit error": lambda one: one.logit_error}
    groups = _by_scale_and_method(measured)
    for panel, (label, measure) in zip(panels, measures.items(), strict=True):
        for method in dict.fromkeys(one.method for one in measured):
            by_scale = {scale: list(map(measure, members)) for (scale, m), members in sorted(groups.items()) if m == method}
            means = [statistics.fmean(values) for values in by_scale.values()]
            below = [mean - min(values) for mean, values in zip(means, by_scale.values(), strict=True)]
            above = [max(values) - mean for mean, values in zip(means, by_scale.values(), strict=True)]
            panel.errorbar(list(by_scale), means, [below, above], marker="o", markersize=4, capsize=3, label=method)
        panel.set(xscale="log", xlabel="scale (rank / full rank)", ylabel=label)
        panel.set_xticks(
            sorted({one.scale for one in measured}), [f"{scale:g}" for scale in sorted({one.scale for one in measured})]
        )
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    errors = [one.logit_error for one in measured]
    if max(errors) > 10 * min(errors) > 0:
        panels[1].set(yscale="log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{title} before training", parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return file.getvalue()
