"""What a network loses by its budget, before training: the ranks that are chosen for it, against one scale for all kernels."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.plan import budget_arguments, plan_by_rules
from lowrank_jax.experiment.config.schema import BudgetConfig, Config
from lowrank_jax.experiment.report.drawing import default_style
from lowrank_jax.planning.allocate import allocate, check_budget, smallest_budgets
from lowrank_jax.planning.curves import Losses, curves_of_kernels
from lowrank_jax.planning.energy import unbounded
from lowrank_jax.planning.plans import FactoredKernel, Plan
from lowrank_jax.text import first_line

Points = list[tuple[float, float]]
"""Budgets, as fractions of the dense network, and what is lost within each."""

_BUDGETS = 12
_LOST = {
    "correlation": "-log of the squared correlation kept",
    "risk": "relative function risk, summed over kernels",
    "tolerance": "largest relative function risk of a kernel",
    "uniform": "relative function risk, summed over kernels",
}


@dataclasses.dataclass(frozen=True)
class BudgetCurve:
    """Budgets of one kind.

    Attributes:
      kind: such as "macs".
      objective: what is lost.
      chosen: with the ranks that are chosen for each budget, from the smallest possible one on.
      uniform: with the largest scale for all kernels that fits, for each of these budgets where one does.
      own: the config's budget, as a fraction; None if it has none of this kind.
    """

    kind: str
    objective: str
    chosen: Points
    uniform: Points
    own: float | None


def budget_curves(config: Config) -> list[BudgetCurve]:
    """A curve for each kind of the config's budget, or for parameters and MACs if it has none; by shapes alone.

    Raises:
      ConfigError: the network is dense, nothing of it is left open, or no budget is possible.
    """
    if config.lowrank.method == "none":
        raise ConfigError("config", ["lowrank.method: 'none'; a dense network has no ranks to choose"])
    own = config.lowrank.budget.amounts
    whole = config if own else _with_budget(config)
    network = _Network(unbounded(plan_by_rules(whole)), dict(budget_arguments(whole)))
    if not network.open:
        raise ConfigError("config", ["lowrank.rules: they leave no kernel open to a budget"])
    try:
        return [network.curve(kind, own.get(kind)) for kind in own or ("params", "macs") if own or network.knows(kind)]
    except ValueError as error:
        raise ConfigError("config", [f"lowrank.budget: {first_line(error)}"]) from None


def _with_budget(config: Config) -> Config:
    return dataclasses.replace(config, lowrank=dataclasses.replace(config.lowrank, budget=BudgetConfig(params=1.0)))


class _Network:
    """A plan whose ranks are open, what each of them loses and costs."""

    def __init__(self, plan: Plan, arguments: Mapping[str, Any]):
        self.plan, self.objective = plan, arguments["objective"]
        self.open = [kernel for kernel in plan.kernels if kernel.choices]
        self._settings = {key: value for key, value in arguments.items() if key not in ("params", "macs", "bytes", "seconds")}
        self._lost: Mapping[str, Sequence[Losses | None]] = curves_of_kernels(self.open)

    def knows(self, kind: str) -> bool:
        """Whether all kernels have a cost of this kind."""
        try:
            check_budget(self.plan, **{kind: 1.0}, **self._settings)
        except ValueError:
            return False
        return True

    def curve(self, kind: str, own: float | int | None) -> BudgetCurve:
        (least,) = smallest_budgets(self.plan, **{kind: 1.0}, **self._settings).values()
        budgets = [float(budget) for budget in np.geomspace(least, 1.0, _BUDGETS)]
        budgets[0], budgets[-1] = least, 1.0  # np.geomspace may miss them by a rounding
        chosen, uniform = (self._points(kind, budgets, objective) for objective in (self.objective, "uniform"))
        fraction = own / self._whole(kind) if isinstance(own, int) else own
        return BudgetCurve(kind, self.objective, chosen, uniform, fraction)

    def _points(self, kind: str, budgets: Sequence[float], objective: str) -> Points:
        points = []
        for budget in budgets:
            with contextlib.suppress(ValueError):  # ranks that fit need not be of one scale
                plan = allocate(self.plan, **{kind: budget}, **{**self._settings, "objective": objective})
                points.append((budget, self.loss(plan)))
        return points

    def loss(self, plan: Plan) -> float:
        """What the budget is to keep small."""
        found = [self._loss(kernel) for kernel in plan.factored]
        return max(found, default=0.0) if self.objective == "tolerance" else math.fsum(found)

    def _loss(self, kernel: FactoredKernel) -> float:
        losses = self._lost[kernel.name][kernel.choices.index(kernel.choice)]
        assert losses is not None  # of Gaussian kernels every choice has them
        by_rank = losses.correlation if self.objective == "correlation" else losses.risk
        copies = 1 if self.objective == "tolerance" else math.prod(kernel.stack)
        return copies * float(by_rank[kernel.rank - 1])

    def _whole(self, kind: str) -> int:
        """What the dense network costs, of what may be given as a count."""
        whole = {
            "params": self.plan.dense_params,
            "bytes": self.plan.dense_params * self._settings["itemsize"],
            "macs": self.plan.dense_macs,
        }
        return whole[kind]


def draw(curves: Sequence[BudgetCurve], title: str, suffix: str = ".png") -> bytes:
    """A panel for each curve."""
    with default_style():
        figure = Figure(figsize=(1.5 + 5.0 * len(curves), 4.2), layout="constrained")
        for panel, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            _panel(panel, curve)
        figure.suptitle(f"{title} before training, by its shapes", parse_math=False)
        file = io.BytesIO()
        figure.savefig(file, format=suffix.lower().lstrip("."), dpi=120)
    return file.getvalue()


def _panel(panel: Axes, curve: BudgetCurve) -> None:
    panel.plot(*_columns(curve.chosen), marker="o", ms=4, label="ranks chosen for the budget")
    panel.plot(*_columns(curve.uniform), marker="s", ms=4, ls="--", label="one scale for all kernels")
    if curve.own is not None:
        panel.axvline(curve.own, color="black", lw=0.8, ls=":", label="the config's budget")
    panel.set(xscale="log", xlabel=f"{curve.kind}, of the dense network", ylabel=_LOST[curve.objective])
    low = min(budget for budget, _ in (*curve.chosen, *curve.uniform))
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1.0) if tick >= 0.8 * low]
    ticks = [tick for tick in ticks if low > 0.45 or tick not in (0.7, 0.8, 0.9)]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [budget for budget, _ in points], [lost for _, lost in points]
