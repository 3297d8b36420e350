"""What a budget is spent on: what of a network is open, what is fixed, and what the whole of it costs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lowrank_jax.planning import knapsack
from lowrank_jax.planning.budget import LEAST_OF_SECONDS, Kind, Request
from lowrank_jax.planning.curves import Losses
from lowrank_jax.planning.options import Points, all_points, dense_cost
from lowrank_jax.planning.plans import Plan, PlannedKernel


@dataclasses.dataclass(frozen=True)
class Network:
    """What a budget is for.

    Attributes:
      open: the kernels that it decides about.
      given: the budget by kind.
      request: the other arguments.
      fixed: by kind, the cost of what the budget cannot change.
      whole: by kind, the cost of the dense network.
    """

    open: list[PlannedKernel]
    given: Mapping[Kind, float | int]
    request: Request
    fixed: np.ndarray
    whole: np.ndarray

    @classmethod
    def of(cls, plan: Plan, given: Mapping[Kind, float | int], request: Request) -> "Network":
        """Raises ValueError if the budget is in MACs that are not known."""
        open_ = [kernel for kernel in plan.kernels if kernel.choices]
        unknown = [kernel.name for kernel in open_ if not kernel.macs and kernel.execution != "premerged"]
        if "macs" in given and unknown:
            raise ValueError(f"the MACs of {', '.join(unknown)} are not known, so that no budget of MACs can hold")
        fixed = np.array([_fixed(plan, open_, kind, request) for kind in given], float)
        whole = np.array([_whole(plan, kind, request) for kind in given], float)
        return cls(open_, given, request, fixed, whole)

    @property
    def limits(self) -> np.ndarray:
        return np.array([_limit(value, total) for value, total in zip(self.given.values(), self.whole, strict=True)], float)

    def points(self, losses: Mapping[str, Sequence[Losses | None]]) -> list["Points"]:
        return all_points(self.open, losses, self.request, tuple(self.given))

    def least(self, options: Sequence[knapsack.Options]) -> np.ndarray:
        """By kind, the least that the network can cost, each kind for itself."""
        least = np.zeros(len(self.given))
        for place in range(len(self.given) if options else 0):
            cheapest = knapsack.cheapest(options, np.eye(len(self.given))[place])
            least[place] = knapsack.total_cost(options, cheapest)[place]
        return self.fixed + least

    def impossible(self, options: Sequence[knapsack.Options]) -> str:
        """That the budget is, and which is not."""
        if not options:
            return "the budget is impossible: the plan's rules leave no kernel open"
        parts = []
        least, values = self.least(options), self.given.items()
        for (kind, value), smallest, whole in zip(values, least, self.whole, strict=True):
            count = "" if kind == "seconds" else f", {math.ceil(smallest):,}"
            parts.append(
                f"{kind}={value}: the smallest possible is {_rounded_up(smallest / whole)} of the dense network{count}"
            )
        default = self.request.min_scale is None and "seconds" in self.given
        scale = f", with ranks of at least {LEAST_OF_SECONDS}; min_scale=0 allows any" if default else ""
        both = " (each for itself), and no plan was found that holds both" if len(self.given) > 1 else ""
        return f"the budget is impossible; {'; '.join(parts)}{both}{scale}"


def _fixed(plan: Plan, open_: Sequence[PlannedKernel], kind: Kind, request: Request) -> float:
    """The cost of what the budget cannot change."""
    names = {kernel.name for kernel in open_}
    closed = sum(dense_cost(kernel, kind, request) for kernel in plan.kernels if kernel.name not in names)
    others = {"params": plan.other_params, "bytes": plan.other_params * request.itemsize, "macs": 0, "seconds": request.rest}
    return closed + others[kind]


def _whole(plan: Plan, kind: Kind, request: Request) -> float:
    """The cost of the whole dense network."""
    return _fixed(plan, (), kind, request)


def _limit(value: float | int, whole: float) -> float:
    return value * whole * (1 + 1e-12) if isinstance(value, float) else value


def _rounded_up(fraction: float) -> float:
    return math.ceil(fraction * 1e4) / 1e4
