"""Ranks from a budget: the plan that loses least within so many parameters, multiply-accumulates, bytes or seconds."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax.planning import knapsack
from lowrank_jax.planning.chips import Chip
from lowrank_jax.planning.curves import curves_of_kernels
from lowrank_jax.planning.energy import closed, energy_of, with_bounds
from lowrank_jax.planning.plans import DenseKernel, FactoredKernel, Plan, PlannedKernel
from lowrank_jax.planning.points import Kind, Points, Request, all_points, dense_cost, execution_of, rule_of
from lowrank_jax.planning.rules import rank_at
from lowrank_jax.text import did_you_mean, shown

OBJECTIVES = ("correlation", "risk", "tolerance")


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

    Without a budget it only finds the ranks of rules that give an energy, from `variables`.

    The rules of the plan are bounds: no rank is above that of its rule, and what they keep dense stays dense.  A kernel whose
    rule's rank would save no parameters, as with a scale of 1, may be factored or stay dense.  Uniform scales are always
    candidates.  Before training all kernels of a shape are alike: without `variables` shapes and costs alone decide.

    Args:
      plan: from `plan`.
      params, macs, bytes, seconds: one budget, or two.  A float up to 1 is a fraction of the whole dense network, what cannot
        be factored included; a whole number is an absolute count.  `bytes` are those of the parameters.  `seconds` is a
        fraction of the dense training step, by the model of `chip`.  A budget in MACs fixes the execution that it counted on,
        `factored`; one in seconds the faster one.
      chip, batch: for `seconds`: the device, and the examples per step on it.
      itemsize: bytes of a parameter; for `seconds`, of an activation.
      rest: for `seconds`: how long the dense step takes besides its kernels, in seconds, from `rest_of_step`.
      objective: what is to be least: `correlation`, minus the logarithm of the product over kernels of the squared
        correlation that their outputs keep with the dense ones; `risk`, the sum of their relative function risks; or
        `tolerance`, the largest of them.
      min_scale: no rank is below this fraction of full rank.
      multiple_of: ranks are multiples of this and of the rule's, where a kernel has so many.
      variables: the dense model's variables or parameters, whose kernels are decomposed; None for Gaussian kernels.
      moments: from `inputs.second_moments(..., plan.opened())`, for the layers' real inputs; needs `variables`.  A scheme whose
        moments are not there is not considered.
      sensitivity: by name, what a kernel's loss counts; 1 for those that are not there.

    Returns:
      A plan whose table also shows each kernel's relative risk, and what the next per cent of the budget would take off
      what is lost there (of the objective), in proportion where the next rank needs more.

    Raises:
      ValueError: no budget and no energy, or more than two budgets; an energy without variables; a budget is impossible (the
        smallest possible one is named), or MACs of a kernel are not known; an argument is out of range; the variables do not
        fit the plan.
    """
    request = Request(chip, _plain(batch), _plain(itemsize), _plain(rest), objective, _plain(min_scale), _plain(multiple_of))
    budgets = {"params": params, "macs": macs, "bytes": bytes, "seconds": seconds}
    given: dict[Kind, Any] = {kind: _plain(value) for kind, value in budgets.items() if value is not None}  # type: ignore[misc]
    open_ = [kernel for kernel in plan.kernels if kernel.choices]
    if not given and any(energy_of(kernel) is not None for kernel in open_):
        return _closed(plan, variables, moments)
    _check_request(request, given)
    _check_sensitivity(sensitivity or {}, open_)
    unknown = [kernel.name for kernel in open_ if not kernel.macs and kernel.execution != "premerged"]
    if "macs" in given and unknown:
        raise ValueError(f"the MACs of {', '.join(unknown)} are not known, so that no budget of MACs can hold")
    _check_moments(variables, moments)
    curves = curves_of_kernels(open_, variables, moments)
    open_ = with_bounds(open_, curves, variables is not None)
    points = all_points(open_, curves, request, tuple(given))
    fixed = np.array([_fixed(plan, open_, kind, request) for kind in given])
    whole = np.array([_whole(plan, kind, request) for kind in given])
    limits = np.array([_limit(value, total) for value, total in zip(given.values(), whole, strict=True)])
    options = _weighted(points, open_, sensitivity or {}, objective)
    chosen = _solve(options, limits - fixed, objective, _uniforms(open_, points))
    if chosen is None:
        raise ValueError(_impossible(options, given, fixed, whole))
    gains = _next_gains(options, chosen, 0.01 * limits)
    lines = {
        kernel.name: _line(kernel, of_kernel, option, gain)
        for kernel, of_kernel, option, gain in zip(open_, points, chosen, gains, strict=True)
    }
    return dataclasses.replace(plan, kernels=tuple(lines.get(kernel.name, kernel) for kernel in plan.kernels))


def _closed(plan: Plan, variables: Any, moments: Mapping[str, jax.Array] | None) -> Plan:
    """The plan with the ranks that its rules' energies ask for."""
    _check_moments(variables, moments)
    mine = [kernel for kernel in plan.kernels if kernel.choices and energy_of(kernel) is not None]
    given = None if moments is None else {kernel.name: moments[kernel.name] for kernel in mine if kernel.name in moments}
    curves = curves_of_kernels(mine, variables, given)
    lines = {kernel.name: closed(kernel, curves[kernel.name]) for kernel in with_bounds(mine, curves, variables is not None)}
    return dataclasses.replace(plan, kernels=tuple(lines.get(kernel.name, kernel) for kernel in plan.kernels))


def _check_moments(variables: Any, moments: Any) -> None:
    if moments is not None and variables is None:
        raise ValueError("moments need the variables too: they say what the kernels do with the inputs")


def _check_request(request: Request, given: Mapping[Kind, float | int]) -> None:
    if not 1 <= len(given) <= 2:
        raise ValueError("give one budget, or two: params, macs, bytes or seconds")
    for kind, value in given.items():
        _check_budget(kind, value)
    if request.objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {request.objective!r}{did_you_mean(request.objective, OBJECTIVES)}")
    if not _is_number(request.min_scale) or not 0 <= request.min_scale <= 1:
        raise ValueError(f"min_scale {shown(request.min_scale)} must be from 0 to 1")
    for name in ("multiple_of", "itemsize"):
        value = getattr(request, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} {shown(value)} must be a whole number of at least 1")
    if "seconds" in given and (not isinstance(request.chip, Chip) or type(request.batch) is not int or request.batch < 1):
        raise ValueError("a budget of seconds needs chip, one of lowrank_jax.chips.CHIPS, and batch, the examples on it")
    if not _is_number(request.rest) or request.rest < 0:
        raise ValueError(f"rest {shown(request.rest)} must be a number of seconds")


def _check_budget(kind: str, value: float | int) -> None:
    if isinstance(value, float) and 0 < value <= 1:
        return
    if kind != "seconds" and type(value) is int and value >= 1:
        return
    what = "a fraction above 0 and up to 1" + ("" if kind == "seconds" else ", such as 0.5, or a whole number")
    raise ValueError(f"{kind}={shown(value)} must be {what}")


def _check_sensitivity(values: Mapping[str, Any], kernels: Sequence[PlannedKernel]) -> None:
    names = [kernel.name for kernel in kernels]
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"sensitivity: {name!r} is no kernel that the plan's rules leave open{did_you_mean(name, names)}")
        if not _is_number(_plain(value)) or value < 0:
            raise ValueError(f"sensitivity of {name!r}: {shown(value)} must be a number of at least 0")


def _plain(value: Any) -> Any:
    """A number of Python's for one of NumPy's or jax's."""
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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


def _weighted(
    points: Sequence[Points], kernels: Sequence[PlannedKernel], sensitivity: Mapping[str, float], objective: str
) -> list[knapsack.Options]:
    found = []
    for kernel, of_kernel in zip(kernels, points, strict=True):
        loss = of_kernel.correlation if objective == "correlation" else of_kernel.risk
        copies = 1 if objective == "tolerance" else math.prod(kernel.stack)  # of a repeated module, each loses so much
        found.append(knapsack.Options(of_kernel.cost, sensitivity.get(kernel.name, 1.0) * copies * loss))
    return found


def _solve(
    options: Sequence[knapsack.Options], limits: np.ndarray, objective: str, uniforms: Sequence[list[int]]
) -> list[int] | None:
    """The best one of what the solver finds and the uniform plans that fit; None if nothing fits."""
    if (limits < 0).any() or not options:
        return None if (limits < 0).any() else []
    least: Callable[..., list[int] | None] = knapsack.least_worst if objective == "tolerance" else knapsack.least_sum
    solved = least(options, np.maximum(limits, 1e-300))
    found = [chosen for chosen in uniforms if (knapsack.total_cost(options, chosen) <= limits).all()]

    def lost(chosen: list[int]) -> float:
        losses = [of_kernel.loss[option] for of_kernel, option in zip(options, chosen, strict=True)]
        return float(max(losses, default=0) if objective == "tolerance" else sum(losses))

    return min([*([] if solved is None else [solved]), *found], key=lost, default=None)


_SCALES = np.arange(1, 201) / 200  # uniform plans that are candidates


def _uniforms(kernels: Sequence[PlannedKernel], points: Sequence[Points]) -> list[list[int]]:
    """The plans of uniform scales, as `plan` makes them, within the rules' bounds; in either execution."""
    by_kernel = [_uniform(kernel, of_kernel) for kernel, of_kernel in zip(kernels, points, strict=True)]
    return [list(chosen) for chosen in dict.fromkeys(zip(*by_kernel, strict=True))]


def _uniform(kernel: PlannedKernel, points: Points) -> list[int]:
    """A kernel's options at all scales, in its rule's own scheme if that is open; in the first execution, then in the last."""
    place = 0 if (points.choice == 0).any() else int(points.choice.max())
    own, dense = np.flatnonzero((points.choice == place) & (points.rank > 0)), np.flatnonzero(points.rank == 0)
    if not len(own):
        return [int(dense[0])] * (2 * len(_SCALES))
    view = kernel.choices[place].view
    wanted = np.array([rank_at(rule_of(kernel), view, float(scale)) for scale in _SCALES])
    ranks, first, count = np.unique(points.rank[own], return_index=True, return_counts=True)
    nearest = np.maximum(np.searchsorted(ranks, wanted, side="right") - 1, 0)
    saves = wanted * (view.n + view.m) < view.n * view.m
    options = [own[first[nearest]], own[(first + count - 1)[nearest]]]  # of a rank, executions follow each other
    return [int(option) for each in options for option in (np.where(saves, each, dense[0]) if len(dense) else each)]


def _impossible(
    options: Sequence[knapsack.Options], given: Mapping[Kind, float | int], fixed: np.ndarray, whole: np.ndarray
) -> str:
    if not options:
        return "the budget is impossible: the plan's rules leave no kernel open"
    parts = []
    for place, (kind, value) in enumerate(given.items()):
        weights = np.eye(len(given))[place]
        least = fixed[place] + knapsack.total_cost(options, knapsack.cheapest(options, weights))[place]
        count = "" if kind == "seconds" else f", {math.ceil(least):,}"
        parts.append(
            f"{kind}={value}: the smallest possible is {_rounded_up(least / whole[place])} of the dense network{count}"
        )
    both = " (each for itself), and no plan was found that holds both" if len(given) > 1 else ""
    return f"the budget is impossible; {'; '.join(parts)}{both}"


def _rounded_up(fraction: float) -> float:
    return math.ceil(fraction * 1e4) / 1e4


def _next_gains(options: Sequence[knapsack.Options], chosen: Sequence[int], more: np.ndarray) -> list[float | None]:
    """What the best use of so much more of the budgets, `[budgets]`, for one kernel alone would take off its loss.

    In proportion where a kernel needs more than that for its next rank.
    """
    gains: list[float | None] = []
    for kernel, option in zip(options, chosen, strict=True):
        needed = ((kernel.cost - kernel.cost[:, option : option + 1]) / more[:, None]).max(axis=0)
        gain = float(np.max((kernel.loss[option] - kernel.loss) / np.maximum(needed, 1)))
        gains.append(gain if gain > 0 else None)
    return gains


def _line(kernel: PlannedKernel, points: Points, option: int, gain: float | None) -> PlannedKernel:
    """The kernel as it was chosen."""
    place, risk = int(points.choice[option]), float(points.risk[option])
    forced = kernel.execution if kernel.execution == "premerged" else None
    note = kernel.note
    if place < 0:
        execution = execution_of(kernel)
        note = "the budget affords it" if len(points.rank) > 1 and not forced else note
        return DenseKernel(**kernel.shared, execution=execution, note=note, risk=0.0, next_gain=gain)
    return FactoredKernel(
        **kernel.shared,
        choice=kernel.choices[place],
        rank=int(points.rank[option]),
        execution=points.execution[option],
        note=note if forced else "",
        risk=risk,
        next_gain=gain,
    )
