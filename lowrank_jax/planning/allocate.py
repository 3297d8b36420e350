"""Ranks from a budget: the plan that loses least within so many parameters, multiply-accumulates, bytes or seconds."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lowrank_jax.kernel import Execution
from lowrank_jax.planning import knapsack
from lowrank_jax.planning.chips import Chip
from lowrank_jax.planning.curves import Losses, curves_of_kernels
from lowrank_jax.planning.execution import dense_seconds, seconds_of
from lowrank_jax.planning.plans import Choice, DenseKernel, FactoredKernel, Plan, PlannedKernel
from lowrank_jax.planning.rules import wanted_rank
from lowrank_jax.text import did_you_mean, shown

OBJECTIVES = ("correlation", "risk", "tolerance")

Kind = Literal["params", "macs", "bytes", "seconds"]


def allocate(
    plan: Plan,
    *,
    params: float | int | None = None,
    macs: float | int | None = None,
    bytes: float | int | None = None,
    seconds: float | None = None,
    chip: Chip | None = None,
    batch: int | None = None,
    itemsize: int = 4,
    rest: float = 0.0,
    objective: str = "correlation",
    min_scale: float = 0.0,
    multiple_of: int = 1,
    variables: Any = None,
    moments: Mapping[str, jax.Array] | None = None,
    sensitivity: Mapping[str, float] | None = None,
) -> Plan:
    """Chooses the rank of every kernel, or to leave it dense, so that the network loses least within a budget.

        plan = lr.plan(model, inputs, [lr.Rule(".*kernel", scale=1.0)])
        plan = lr.allocate(plan, macs=0.5)

    The rules of the plan are bounds: no rank is above that of its rule, and what they keep dense stays dense.  A kernel whose
    rule's rank would save no parameters, as with a scale of 1, may be factored or stay dense.  The largest uniform scale is
    always a candidate.  Before training all kernels of a shape are alike: without `variables` shapes and costs alone decide.

    Args:
      plan: from `plan`.
      params, macs, bytes, seconds: one budget, or two.  A float up to 1 is a fraction of the whole dense network, what cannot
        be factored included; a whole number is an absolute count.  `bytes` are those of the parameters.  `seconds` is a
        fraction of the dense training step, by the model of `chip`.  A budget in MACs fixes the execution that it counted on,
        `factored`; one in seconds the faster one.
      chip, batch: for `seconds`: the device, and the examples per step on it.
      itemsize: bytes of a parameter; for `seconds`, of an activation.
      rest: for `seconds`: how long the dense step takes besides its kernels, in seconds.
      objective: what is to be least: `correlation`, minus the logarithm of the product over kernels of the squared
        correlation that their outputs keep with the dense ones; `risk`, the sum of their relative function risks; or
        `tolerance`, the largest of them.
      min_scale: no rank is below this fraction of full rank.
      multiple_of: ranks are multiples of this, where a kernel has so many.
      variables: the dense model's variables or parameters, whose kernels are decomposed; None for Gaussian kernels.
      moments: from `inputs.second_moments`, for the layers' real inputs; needs `variables`.
      sensitivity: by name, what a kernel's loss counts; 1 for those that are not there.

    Returns:
      A plan whose table also shows each kernel's relative risk, and what the next per cent of the budget would take off the
      objective there.

    Raises:
      ValueError: no budget, or more than two; it is impossible (the smallest possible one is named), or MACs of a kernel are
        not known; an argument is out of range; the variables do not fit the plan.
    """
    request = _Request(chip, batch, itemsize, rest, objective, min_scale, multiple_of)
    budgets = {"params": params, "macs": macs, "bytes": bytes, "seconds": seconds}
    given: dict[Kind, float | int] = {kind: value for kind, value in budgets.items() if value is not None}  # type: ignore[misc]
    request.check(given)
    open_ = [kernel for kernel in plan.kernels if kernel.choices]
    _check_names(sensitivity, open_, "sensitivity")
    if "macs" in given and (unknown := [kernel.name for kernel in open_ if not kernel.macs]):
        raise ValueError(f"the MACs of {', '.join(unknown)} are not known, so that no budget of MACs can hold")
    if moments is not None and variables is None:
        raise ValueError("moments need the variables too: they say what the kernels do with the inputs")
    curves = curves_of_kernels(open_, variables, moments)
    points = [_points(kernel, curves[kernel.name], request, tuple(given)) for kernel in open_]
    fixed = np.array([_fixed(plan, open_, kind, request) for kind in given])
    whole = np.array([_whole(plan, kind, request) for kind in given])
    limits = np.array([_limit(value, total) for value, total in zip(given.values(), whole, strict=True)])
    options = _weighted(points, open_, sensitivity or {}, objective)
    chosen = _solve(options, limits - fixed, objective, _uniform(points, options, limits - fixed))
    if chosen is None:
        raise ValueError(_impossible(options, given, fixed, whole))
    gains = _next_gains(options, chosen, 0.01 * limits)
    lines = {
        kernel.name: _line(kernel, of_kernel, option, gain)
        for kernel, of_kernel, option, gain in zip(open_, points, chosen, gains, strict=True)
    }
    return dataclasses.replace(plan, kernels=tuple(lines.get(kernel.name, kernel) for kernel in plan.kernels))


@dataclasses.dataclass(frozen=True)
class _Request:
    """The arguments of `allocate` that are not the network's."""

    chip: Chip | None
    batch: int | None
    itemsize: int
    rest: float
    objective: str
    min_scale: float
    multiple_of: int

    def check(self, given: Mapping[Kind, float | int]) -> None:
        if not 1 <= len(given) <= 2:
            raise ValueError("give one budget, or two: params, macs, bytes or seconds")
        for kind, value in given.items():
            _check_budget(kind, value)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}{did_you_mean(self.objective, OBJECTIVES)}")
        if isinstance(self.min_scale, bool) or not 0 <= self.min_scale <= 1:
            raise ValueError(f"min_scale {shown(self.min_scale)} must be from 0 to 1")
        for name in ("multiple_of", "itemsize"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {shown(value)} must be a whole number of at least 1")
        if "seconds" in given and (not isinstance(self.chip, Chip) or type(self.batch) is not int or self.batch < 1):
            raise ValueError("a budget of seconds needs chip, one of lowrank_jax.chips.CHIPS, and batch, the examples on it")
        if self.rest < 0 or not math.isfinite(self.rest):
            raise ValueError(f"rest {shown(self.rest)} must be a number of seconds")


def _check_budget(kind: str, value: float | int) -> None:
    if isinstance(value, float) and 0 < value <= 1:
        return
    if kind != "seconds" and type(value) is int and value >= 1:
        return
    what = "a fraction above 0 and up to 1" + ("" if kind == "seconds" else ", such as 0.5, or a whole number")
    raise ValueError(f"{kind}={shown(value)} must be {what}")


def _check_names(values: Mapping[str, Any] | None, kernels: Sequence[PlannedKernel], what: str) -> None:
    names = [kernel.name for kernel in kernels]
    for name in values or {}:
        if name not in names:
            raise ValueError(f"{what}: {name!r} is no kernel that the plan's rules leave open{did_you_mean(name, names)}")


@dataclasses.dataclass(frozen=True)
class _Points:
    """What one kernel may become: arrays over its options.

    Attributes:
      choice: the place among the kernel's choices, -1 for dense.
      rank: the rank, 0 for dense.
      execution: by option.
      risk: relative.
      correlation: one minus the squared correlation that is kept.
      cost: `[budgets, options]`.
      scale: the rank as a fraction of full rank, 1 for dense.
    """

    choice: np.ndarray
    rank: np.ndarray
    execution: list[Execution | None]
    risk: np.ndarray
    correlation: np.ndarray
    cost: np.ndarray
    scale: np.ndarray


def _points(kernel: PlannedKernel, losses: Sequence[Losses], request: _Request, kinds: tuple[Kind, ...]) -> _Points:
    ranks = [(place, rank) for place, choice in enumerate(kernel.choices) for rank in _ranks(kernel, choice, request)]
    if not ranks and isinstance(kernel, FactoredKernel):  # none is allowed: it stays what the plan says
        ranks = [(0, kernel.rank)]
    ways = _executions(kernel, kinds)
    rows: list[tuple[int, int, Execution | None]] = [(place, rank, way) for place, rank in ranks for way in ways]
    if isinstance(kernel, DenseKernel):
        rows.append((-1, 0, None))

    def lost(curve: str) -> np.ndarray:
        return np.array([getattr(losses[place], curve)[rank - 1] if rank else 0.0 for place, rank, _ in rows])

    return _Points(
        choice=np.array([place for place, *_ in rows]),
        rank=np.array([rank for _, rank, _ in rows]),
        execution=[execution for *_, execution in rows],
        risk=lost("risk"),
        correlation=lost("correlation"),
        cost=np.array([[_cost(kernel, *row, kind, request) for row in rows] for kind in kinds]),
        scale=np.array([rank / kernel.choices[place].view.full_rank if rank else 1.0 for place, rank, _ in rows]),
    )


def _ranks(kernel: PlannedKernel, choice: Choice, request: _Request) -> range:
    """The ranks that a kernel may have: those of which the rule's is the largest, and that save parameters."""
    assert kernel.rule is not None
    view, step = choice.view, math.lcm(request.multiple_of, kernel.rule.multiple_of)
    bound = min(wanted_rank(kernel.rule, view) or view.full_rank, view.full_rank)
    bound = min(bound, (view.n * view.m - 1) // (view.n + view.m))
    low = max(1, math.ceil(request.min_scale * view.full_rank - 1e-9))
    if bound < step:  # too few for a multiple
        return range(low, bound + 1)
    first = -(-low // step) * step
    return range(first, bound + 1, step)


def _executions(kernel: PlannedKernel, kinds: tuple[Kind, ...]) -> tuple[Execution | None, ...]:
    if kernel.execution is not None:
        return (kernel.execution,)
    if "seconds" in kinds:
        return ("factored", "merged")
    return ("factored",) if "macs" in kinds else (None,)


def _cost(kernel: PlannedKernel, place: int, rank: int, execution: Execution | None, kind: Kind, request: _Request) -> float:
    if place < 0:
        return _dense_cost(kernel, kind, request)
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


def _dense_cost(kernel: PlannedKernel, kind: Kind, request: _Request) -> float:
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


def _fixed(plan: Plan, open_: Sequence[PlannedKernel], kind: Kind, request: _Request) -> float:
    """The cost of what the budget cannot change."""
    names = {kernel.name for kernel in open_}
    closed = sum(_dense_cost(kernel, kind, request) for kernel in plan.kernels if kernel.name not in names)
    others = {"params": plan.other_params, "bytes": plan.other_params * request.itemsize, "macs": 0, "seconds": request.rest}
    return closed + others[kind]


def _whole(plan: Plan, kind: Kind, request: _Request) -> float:
    """The cost of the whole dense network."""
    return _fixed(plan, (), kind, request)


def _limit(value: float | int, whole: float) -> float:
    return value * whole * (1 + 1e-12) if isinstance(value, float) else value


def _weighted(
    points: Sequence[_Points], kernels: Sequence[PlannedKernel], sensitivity: Mapping[str, float], objective: str
) -> list[knapsack.Options]:
    found = []
    for kernel, of_kernel in zip(kernels, points, strict=True):
        loss = -np.log1p(-np.minimum(of_kernel.correlation, 1 - 1e-12)) if objective == "correlation" else of_kernel.risk
        found.append(knapsack.Options(of_kernel.cost, sensitivity.get(kernel.name, 1.0) * loss))
    return found


def _solve(
    options: Sequence[knapsack.Options], limits: np.ndarray, objective: str, uniform: list[int] | None
) -> list[int] | None:
    """The better one of what the solver finds and the uniform plan; None if nothing fits."""
    if (limits <= 0).any():
        return None
    least: Callable[..., list[int] | None] = knapsack.least_worst if objective == "tolerance" else knapsack.least_sum
    found = [chosen for chosen in (least(options, limits), uniform) if chosen is not None]

    def lost(chosen: list[int]) -> float:
        losses = [of_kernel.loss[option] for of_kernel, option in zip(options, chosen, strict=True)]
        return float(max(losses, default=0) if objective == "tolerance" else sum(losses))

    return min(found, key=lost, default=None)


def _uniform(points: Sequence[_Points], options: Sequence[knapsack.Options], limits: np.ndarray) -> list[int] | None:
    """The largest uniform scale that fits; None if none does."""

    def at(scale: float) -> list[int]:
        chosen = []
        for of_kernel, kernel in zip(points, options, strict=True):
            own = np.flatnonzero(of_kernel.choice <= 0)  # in the rule's own scheme, or dense
            wanted = np.flatnonzero(of_kernel.scale[own] <= scale + 1e-9)
            best = of_kernel.scale[own][wanted].max() if len(wanted) else of_kernel.scale[own].min()
            same = own[of_kernel.scale[own] == best]
            chosen.append(int(same[np.argmin((kernel.cost[:, same] / limits[:, None]).max(axis=0))]))
        return chosen

    def fits(scale: float) -> bool:
        return bool((knapsack.total_cost(options, at(scale)) <= limits).all())

    if (limits <= 0).any() or not fits(0.0):
        return None
    if fits(1.0):
        return at(1.0)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return at(low)


def _impossible(
    options: Sequence[knapsack.Options], given: Mapping[Kind, float | int], fixed: np.ndarray, whole: np.ndarray
) -> str:
    parts = []
    for place, (kind, value) in enumerate(given.items()):
        weights = np.eye(len(given))[place]
        least = fixed[place] + knapsack.total_cost(options, knapsack.cheapest(options, weights))[place]
        smallest = f"{_rounded_up(least / whole[place])} of the dense network"
        count = "" if kind == "seconds" else f", {math.ceil(least):,}"
        parts.append(f"{kind}={value}: the smallest possible is {smallest}{count}")
    both = " (each for itself; together they may need more)" if len(given) > 1 else ""
    return f"the budget is impossible; {'; '.join(parts)}{both}"


def _rounded_up(fraction: float) -> float:
    return math.ceil(fraction * 1e4) / 1e4


def _next_gains(options: Sequence[knapsack.Options], chosen: Sequence[int], more: np.ndarray) -> list[float | None]:
    """What the best use of so much more of the budgets for one kernel alone would take off the objective."""
    gains: list[float | None] = []
    for kernel, option in zip(options, chosen, strict=True):
        fits = ((kernel.cost - kernel.cost[:, option : option + 1]) <= more[:, None]).all(axis=0)
        gain = float(kernel.loss[option] - kernel.loss[fits].min())
        gains.append(gain if gain > 0 else None)
    return gains


def _line(kernel: PlannedKernel, points: _Points, option: int, gain: float | None) -> PlannedKernel:
    """The kernel as it was chosen."""
    place, risk = int(points.choice[option]), float(points.risk[option])
    common = {field: getattr(kernel, field) for field in ("name", "shape", "macs", "rule", "choices", "own_run")}
    if place < 0:
        return DenseKernel(**common, execution=kernel.execution, note="the budget affords it", risk=0.0, next_gain=gain)
    return FactoredKernel(
        **common,
        choice=kernel.choices[place],
        rank=int(points.rank[option]),
        execution=points.execution[option],
        note=kernel.note if isinstance(kernel, FactoredKernel) else "",
        risk=risk,
        next_gain=gain,
    )
