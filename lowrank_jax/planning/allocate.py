"""Ranks from a budget: the plan that loses least within so many parameters, multiply-accumulates, bytes or seconds."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax.checks import at_least, is_number, plain
from lowrank_jax.planning import knapsack
from lowrank_jax.planning.arguments import check_mapping, check_plan
from lowrank_jax.planning.budget import Kind, Request
from lowrank_jax.planning.chips import Chip
from lowrank_jax.planning.curves import Losses, curves_of_kernels
from lowrank_jax.planning.energy import closed, energy_of, with_bounds
from lowrank_jax.planning.network_cost import Network
from lowrank_jax.planning.options import Points, execution_of
from lowrank_jax.planning.plans import Choice, DenseKernel, FactoredKernel, Plan, PlannedKernel
from lowrank_jax.planning.uniform import largest_uniform, uniforms
from lowrank_jax.projection.methods import TWO_SIDED
from lowrank_jax.projection.two_sided import GradientMoments
from lowrank_jax.text import did_you_mean, shown


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
    objective: str | None = None,
    min_scale: float | None = None,
    multiple_of: int = 1,
    variables: Any = None,
    moments: Mapping[str, jax.Array] | None = None,
    gradients: Mapping[str, GradientMoments] | None = None,
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
      objective: what is to be least: `tolerance`, the largest relative function risk of a kernel; `correlation`, minus the
        logarithm of the product over kernels of the squared correlation that their outputs keep with the dense ones; `risk`,
        the sum of their relative function risks; `divergence`, the sum of what the network's loss gains of each, to second
        order, which needs `gradients`; or `uniform`, to compare with: nothing is weighed, and the largest scale that fits is
        that of all kernels.  None is `divergence` with gradients and `tolerance` without.
      min_scale: no rank is below this fraction of full rank.  None is 0, but 0.05 for a budget of seconds, and at least rank
        2, where rules allow so much: at rank 1 a layer may be cheap in seconds, and worthless.
      multiple_of: ranks are multiples of this and of the rule's, where a kernel has so many.
      variables: the dense model's variables or parameters, whose kernels are decomposed; None for Gaussian kernels.
      moments: from `inputs.second_moments(..., plan.opened())`, for the layers' real inputs; needs `variables`.  A scheme whose
        moments are not there is not considered.
      gradients: from `inputs.gradient_moments(..., plan.opened())`, for rules of the method `two_sided`; needs `variables`.
      sensitivity: by name, what a kernel's loss counts; 1 for those that are not there.  One of 0 gets what the others leave.
        With gradients, from `sensitivity(..., gradients=)`: how many times its expected divergence a kernel really loses.

    Returns:
      A plan whose table also shows each kernel's relative risk, and what the next per cent of the budget would take off
      what is lost there (of the objective), in proportion where the next rank needs more.

    Raises:
      TypeError: the plan is none, or moments, gradients or sensitivity are no dict.
      ValueError: no budget and no energy, or more than two budgets; an energy without variables; a budget is impossible (the
        smallest possible one is named), or MACs of a kernel are not known; an argument is out of range; the variables do not
        fit the plan.
    """
    check_plan(plan)
    check_mapping("moments", moments)
    check_mapping("gradients", gradients)
    check_mapping("sensitivity", sensitivity)
    _check_gradients(plan, objective, gradients)
    objective = objective or ("tolerance" if gradients is None else "divergence")
    request = Request(chip, plain(batch), plain(itemsize), plain(rest), objective, plain(min_scale), plain(multiple_of))
    budgets = {"params": params, "macs": macs, "bytes": bytes, "seconds": seconds}
    given: dict[Kind, Any] = {kind: plain(value) for kind, value in budgets.items() if value is not None}  # type: ignore[misc]
    if not given and any(energy_of(kernel) is not None for kernel in plan.kernels if kernel.choices):
        return _closed(plan, variables, moments)
    request.check(given)
    network = Network.of(plan, given, request)
    counts = _sensitivities(sensitivity or {}, network.open)
    _check_moments(variables, moments, gradients)
    curves = curves_of_kernels(network.open, variables, moments, gradients)
    if gradients is not None:
        curves, counts = _corrected(curves, counts), {}
    open_ = with_bounds(network.open, curves, variables is not None)
    points = dataclasses.replace(network, open=open_).points(curves)
    options = _weighted(points, open_, counts, objective)
    room = network.limits - network.fixed
    if objective == "uniform":
        chosen = largest_uniform(open_, points, options, room)
    else:
        chosen = _solve(options, room, objective, uniforms(open_, points))
    if chosen is None:
        raise ValueError(network.impossible(options))
    gains = _next_gains(options, chosen, 0.01 * network.limits)
    lines = {
        kernel.name: _line(kernel, of_kernel, option, gain)
        for kernel, of_kernel, option, gain in zip(open_, points, chosen, gains, strict=True)
    }
    return dataclasses.replace(plan, kernels=tuple(lines.get(kernel.name, kernel) for kernel in plan.kernels))


def check_budget(plan: Plan, **arguments: Any) -> None:
    """Raises ValueError for a budget that is impossible, given the arguments of `allocate`; decomposes nothing.

    Of two budgets that cannot hold together only `allocate` knows.
    """
    network, options = _of_arguments(plan, arguments)
    if (network.least(options) > network.limits).any():
        raise ValueError(network.impossible(options))


def smallest_budgets(plan: Plan, **arguments: Any) -> dict[str, float]:
    """By kind, whatever is asked for, the smallest possible budget as a fraction of the dense network; see `check_budget`."""
    network, options = _of_arguments(plan, arguments)
    return dict(zip(network.given, (network.least(options) / network.whole).tolist(), strict=True))


def _of_arguments(plan: Plan, arguments: Mapping[str, Any]) -> tuple[Network, list[knapsack.Options]]:
    """What a budget is for, and the options of its kernels, whose losses are not known."""
    names = {field.name for field in dataclasses.fields(Request)}
    request = Request(**{name: value for name, value in arguments.items() if name in names})
    given: dict[Any, Any] = {name: value for name, value in arguments.items() if name not in names}
    request.check(given)
    network = Network.of(plan, given, request)
    free = {kernel.name: [_no_loss(choice) for choice in kernel.choices] for kernel in network.open}
    return network, _weighted(network.points(free), network.open, {}, request.objective)


def _no_loss(choice: Choice) -> Losses:
    nothing = np.zeros(choice.view.full_rank)
    return Losses(nothing, nothing, nothing, nothing)


def _closed(plan: Plan, variables: Any, moments: Mapping[str, jax.Array] | None) -> Plan:
    """The plan with the ranks that its rules' energies ask for."""
    _check_moments(variables, moments)
    mine = [kernel for kernel in plan.kernels if kernel.choices and energy_of(kernel) is not None]
    given = None if moments is None else {kernel.name: moments[kernel.name] for kernel in mine if kernel.name in moments}
    curves = curves_of_kernels(mine, variables, given)
    lines = {kernel.name: closed(kernel, curves[kernel.name]) for kernel in with_bounds(mine, curves, variables is not None)}
    return dataclasses.replace(plan, kernels=tuple(lines.get(kernel.name, kernel) for kernel in plan.kernels))


def _check_moments(variables: Any, moments: Any, gradients: Any = None) -> None:
    if moments is not None and variables is None:
        raise ValueError("moments need the variables too: they say what the kernels do with the inputs")
    if gradients is not None and variables is None:
        raise ValueError("gradients need the variables too: they say what the kernels are")


def _check_gradients(plan: Plan, objective: Any, gradients: Any) -> None:
    if objective == "divergence" and gradients is None:
        raise ValueError("the objective 'divergence' needs gradients: inputs.gradient_moments measures them")
    if gradients is None:
        return
    others = [kernel.name for kernel in plan.kernels if kernel.choices and kernel.rule and kernel.rule.method != TWO_SIDED]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(f"gradients are for the method {TWO_SIDED!r}, which the rule of {others[0]!r}{more} does not have")


_sensitivity = at_least(0, 1e30)  # so large that no sum of them leaves the floats


def _sensitivities(values: Mapping[str, Any], kernels: Sequence[PlannedKernel]) -> dict[str, float]:
    names, found = [kernel.name for kernel in kernels], {}
    for name, value in values.items():
        if name not in names:
            raise ValueError(
                f"sensitivity: {shown(name)} is no kernel that the plan's rules leave open{did_you_mean(name, names)}"
            )
        found[name] = plain(value)
        complaint = _sensitivity(found[name]) if is_number(found[name]) else "must be a number of at least 0"
        if complaint:
            raise ValueError(f"sensitivity of {name!r}: {shown(value)} {complaint}")
    return found


def _corrected(curves: dict[str, list[Losses | None]], factors: Mapping[str, float]) -> dict[str, list[Losses | None]]:
    """Divergences times what was measured of them."""
    least = _TIE * float(np.mean(list(factors.values()) or [0.0]))

    def corrected(name: str, losses: Losses | None) -> Losses | None:
        return losses and losses._replace(divergence=losses.divergence * max(factors.get(name, 1.0), least))

    return {name: [corrected(name, losses) for losses in found] for name, found in curves.items()}


_TIE = 1e-9  # of the mean weight: what a kernel of weight 0 counts, so that it too takes what the others leave


def _weighted(
    points: Sequence[Points], kernels: Sequence[PlannedKernel], sensitivity: Mapping[str, float], objective: str
) -> list[knapsack.Options]:
    found, weights = [], [sensitivity.get(kernel.name, 1.0) for kernel in kernels]
    least = _TIE * (np.mean(weights) or 1.0) if sensitivity and kernels else 0.0
    for kernel, of_kernel, weight in zip(kernels, points, weights, strict=True):
        loss = {"correlation": of_kernel.correlation, "divergence": of_kernel.divergence}.get(objective, of_kernel.risk)
        copies = 1 if objective == "tolerance" else math.prod(kernel.stack)  # of a repeated module, each loses so much
        found.append(knapsack.Options(of_kernel.cost, (weight + least) * copies * loss))
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
    place = int(points.choice[option])
    lost = math.prod(kernel.stack) * float(points.divergence[option])
    worth = {"risk": float(points.risk[option]), "divergence": None if math.isnan(lost) else lost, "next_gain": gain}
    forced = kernel.execution if kernel.execution == "premerged" else None
    note = kernel.note
    if place < 0:
        execution = execution_of(kernel)
        note = "the budget affords it" if len(points.rank) > 1 and not forced else note
        return DenseKernel(**kernel.shared, execution=execution, note=note, **worth)
    return FactoredKernel(
        **kernel.shared,
        choice=kernel.choices[place],
        rank=int(points.rank[option]),
        execution=points.execution[option],
        note=note if forced else "",
        **worth,
    )
