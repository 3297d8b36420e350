"""What a kernel may become within a budget, and what each of these options costs and loses."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_jax.kernel import Execution
from lowrank_jax.planning.budget import Kind, Request
from lowrank_jax.planning.curves import Losses
from lowrank_jax.planning.decide import problem
from lowrank_jax.planning.execution import dense_seconds, seconds_of
from lowrank_jax.planning.plans import Choice, PlannedKernel
from lowrank_jax.planning.rules import Rule, wanted_rank


@dataclasses.dataclass(frozen=True)
class Points:
    """What one kernel may become: arrays over its options.

    Attributes:
      choice: the place among the kernel's choices, -1 for dense.
      rank: the rank, 0 for dense.
      execution: by option.
      risk: relative.
      correlation: minus the logarithm of the squared correlation that is kept.
      divergence: what the network's loss gains; NaN without gradients.
      cost: `[budgets, options]`.
    """

    choice: np.ndarray
    rank: np.ndarray
    execution: list[Execution | None]
    risk: np.ndarray
    correlation: np.ndarray
    divergence: np.ndarray
    cost: np.ndarray


_Row = tuple[int, int, Execution | None]  # the place among a kernel's choices, -1 for dense, the rank and the execution


def all_points(
    kernels: Sequence[PlannedKernel], curves: Mapping[str, Sequence[Losses | None]], request: Request, kinds: tuple[Kind, ...]
) -> list[Points]:
    """Of every kernel; those that are alike but for their values have the same options and costs."""
    costs: dict[Any, tuple[list[_Row], np.ndarray]] = {}
    found = []
    for kernel in kernels:
        places = tuple(place for place, curve in enumerate(curves[kernel.name]) if curve is not None)
        key = dataclasses.replace(kernel, name=""), kernel.bounds, places
        if key not in costs:
            rows = _rows(kernel, places, request, kinds)
            costs[key] = rows, np.array([[_cost(kernel, *row, kind, request) for row in rows] for kind in kinds], float)
        found.append(_points(curves[kernel.name], *costs[key]))
    return found


def _rows(kernel: PlannedKernel, places: Sequence[int], request: Request, kinds: tuple[Kind, ...]) -> list[_Row]:
    ranks = [(place, rank) for place in places for rank in _ranks(kernel, kernel.choices[place], request, kinds)]
    rows: list[_Row] = [(place, rank, way) for place, rank in ranks for way in _executions(kernel, kinds)]
    return [*rows, (-1, 0, None)] if _may_be_dense(kernel) else rows


def _points(losses: Sequence[Losses | None], rows: list[_Row], cost: np.ndarray) -> Points:
    choice, rank = np.array([place for place, *_ in rows]), np.array([rank for _, rank, _ in rows])

    def lost(curve: str) -> np.ndarray:
        curves = [getattr(of_choice, curve) for of_choice in losses if of_choice is not None]
        values = np.full(len(rows), np.nan if any(np.isnan(of_choice).any() for of_choice in curves) else 0.0)
        for place, of_choice in enumerate(losses):
            if of_choice is not None:
                values[choice == place] = getattr(of_choice, curve)[rank[choice == place] - 1]
        return values

    return Points(
        choice, rank, [execution for *_, execution in rows], lost("risk"), lost("correlation"), lost("divergence"), cost
    )


def rule_of(kernel: PlannedKernel) -> Rule:
    assert kernel.rule is not None  # it has choices
    return kernel.rule


def _may_be_dense(kernel: PlannedKernel) -> bool:
    """Whether the rule itself would keep the kernel dense, since its rank saves nothing; a former budget does not matter."""
    choice = kernel.choices[0]
    rank = _wanted(kernel, choice)
    return rank is None or bool(problem(choice, rank))


def _wanted(kernel: PlannedKernel, choice: Choice) -> int | None:
    """The rank that a kernel's rule asks for."""
    if kernel.bounds:
        return kernel.bounds[kernel.choices.index(choice)]
    return wanted_rank(rule_of(kernel), choice.view)


def _ranks(kernel: PlannedKernel, choice: Choice, request: Request, kinds: tuple[Kind, ...]) -> range:
    """The ranks that a kernel may have: those of which the rule's is the largest, and that save parameters.

    Raises:
      ValueError: the rule's rank is below `min_scale`, and the kernel cannot stay dense.
    """
    view, rule = choice.view, rule_of(kernel)
    wanted = min(_wanted(kernel, choice) or view.full_rank, view.full_rank)
    bound = min(wanted, (view.n * view.m - 1) // (view.n + view.m))
    low = request.smallest_rank(view.full_rank, kinds)
    if request.min_scale is None:
        low = min(low, wanted)
    elif wanted < low and not _may_be_dense(kernel):
        raise ValueError(f"{kernel.name}: min_scale {request.min_scale} needs a rank of {low}; its rule allows {wanted}")
    steps = (math.lcm(request.multiple_of, rule.multiple_of), rule.multiple_of, request.multiple_of, 1)
    step = next(step for step in steps if step <= max(bound, 1))  # of small kernels there may be no multiple
    return range(-(-low // step) * step, bound + 1, step)


def execution_of(kernel: PlannedKernel) -> Execution | None:
    """How a kernel runs on factors, whatever a former budget chose; None if that is open."""
    execution = rule_of(kernel).execution
    if kernel.execution == "premerged":
        return "premerged"
    return None if execution == "auto" else execution


def _executions(kernel: PlannedKernel, kinds: tuple[Kind, ...]) -> tuple[Execution | None, ...]:
    execution = execution_of(kernel)
    if execution is not None:
        return (execution,)
    if "seconds" in kinds:
        return ("factored", "merged")
    return ("factored",) if "macs" in kinds else (None,)


def _cost(kernel: PlannedKernel, place: int, rank: int, execution: Execution | None, kind: Kind, request: Request) -> float:
    if place < 0:
        return dense_cost(kernel, kind, request)
    choice = kernel.choices[place]
    match kind:
        case "params" | "bytes":
            count = math.prod(kernel.stack) * choice.params(rank)
            return count * (request.itemsize if kind == "bytes" else 1)
        case "macs":
            return kernel.macs if execution in ("merged", "premerged") else choice.macs(rank)
        case _:
            assert request.chip is not None and request.batch is not None
            run: Execution = "factored" if execution == "factored" else "merged"
            return seconds_of(kernel, choice, rank, run, request.chip, request.batch, request.itemsize)


def dense_cost(kernel: PlannedKernel, kind: Kind, request: Request) -> float:
    match kind:
        case "params":
            return kernel.params
        case "bytes":
            return kernel.params * request.itemsize
        case "macs":
            return kernel.macs
        case _:
            assert request.chip is not None and request.batch is not None
            return dense_seconds(kernel, request.chip, request.batch, request.itemsize)
