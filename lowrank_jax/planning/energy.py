"""The ranks of rules that give an energy: known once the kernels are."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lowrank_jax.planning.curves import Losses
from lowrank_jax.planning.decide import problem
from lowrank_jax.planning.plans import Choice, DenseKernel, FactoredKernel, OpenKernel, Plan, PlannedKernel
from lowrank_jax.planning.rules import Rule, rounded_up

_ROUNDING = 1e-12  # of float64's sums: a share that is missed by less is kept


def energy_of(kernel: PlannedKernel) -> float | None:
    """The energy that a kernel's rule asks for; None if it asks for something else."""
    return kernel.rule.energy if kernel.rule is not None else None


def awaited(plan: Plan, until: str) -> Plan:
    """The plan to go on with while its open ranks are: dense where they are open, of which it says until when."""
    return _with_open(plan, lambda kernel: dataclasses.replace(kernel, until=until))


def unbounded(plan: Plan) -> Plan:
    """The plan for a budget that does not know the kernels yet: energies bound nothing."""
    return _with_open(plan, lambda kernel: _bounded(kernel, lambda choice: choice.view.full_rank))


def least_bounded(plan: Plan) -> Plan:
    """The plan with the tightest bounds that energies may come to: a budget that is possible then is so with all others."""
    return _with_open(plan, lambda kernel: _bounded(kernel, lambda choice: rounded_up(kernel.rule, 1)))


def _with_open(plan: Plan, change: Callable[[OpenKernel], PlannedKernel]) -> Plan:
    if not plan.waiting:
        return plan
    kernels = (change(kernel) if isinstance(kernel, OpenKernel) else kernel for kernel in plan.kernels)
    return dataclasses.replace(plan, kernels=tuple(kernels))


def _bounded(kernel: OpenKernel, bound: Callable[[Choice], int]) -> OpenKernel:
    return dataclasses.replace(kernel, bounds=tuple(map(bound, kernel.choices)))


def with_bounds(
    kernels: Sequence[PlannedKernel], losses: Mapping[str, Sequence[Losses | None]], known: bool
) -> list[PlannedKernel]:
    """The kernels with the ranks that their rules' energies ask for as bounds.

    Args:
      kernels: of a plan; all have choices.
      losses: of every choice.
      known: whether they are those of the kernels at hand; otherwise the bounds of a former call stay.

    Raises:
      ValueError: there is an energy without values and without a former bound.
    """
    missing = [kernel.name for kernel in kernels if energy_of(kernel) is not None and not known and not kernel.bounds]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"the rule of {missing[0]!r}{more} gives an energy, which only values have: pass variables=")
    if not known:
        return list(kernels)
    return [_with_bound(kernel, losses[kernel.name]) for kernel in kernels]


def _with_bound(kernel: PlannedKernel, losses: Sequence[Losses | None]) -> PlannedKernel:
    rule, energy = kernel.rule, energy_of(kernel)
    if rule is None or energy is None:
        return kernel
    bounds = tuple(None if curve is None else _rank(rule, energy, curve) for curve in losses)
    return dataclasses.replace(kernel, bounds=bounds)


def _rank(rule: Rule, energy: float, losses: Losses) -> int:
    """The smallest rank that keeps the energy."""
    enough = np.flatnonzero(losses.energy >= energy - _ROUNDING)
    return rounded_up(rule, int(enough[0]) + 1)


def closed(kernel: PlannedKernel, losses: Sequence[Losses | None]) -> PlannedKernel:
    """The line of a kernel at its bound, in its rule's own scheme if that is known."""
    place, rank = next((place, rank) for place, rank in enumerate(kernel.bounds) if rank is not None)
    choice, curve = kernel.choices[place], losses[place]
    assert kernel.rule is not None and curve is not None
    note = kernel.note if kernel.execution == "premerged" else ""
    if reason := problem(choice, rank):
        reason = f"energy {kernel.rule.energy}: {reason}"
        return DenseKernel(**kernel.shared, execution=kernel.execution, note=f"{reason}; {note}" if note else reason, risk=0.0)
    lost = float(curve.risk[rank - 1])
    return FactoredKernel(**kernel.shared, choice=choice, rank=rank, execution=kernel.execution, note=note, risk=lost)
