"""The ranks of a plan as plain values, so that what was decided once is read back rather than computed again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank_jax.kernel import Execution
from lowrank_jax.planning.budget import is_number
from lowrank_jax.planning.decide import problem
from lowrank_jax.planning.plans import Choice, DenseKernel, FactoredKernel, OpenKernel, Plan, PlannedKernel
from lowrank_jax.text import shown

_WORTH = {"risk", "next_gain"}
_EXECUTIONS = (None, "factored", "merged", "premerged")


def to_record(plan: Plan) -> dict[str, Any]:
    """What was decided, by name of every kernel that is open to a budget; JSON can hold it.

    `ranks` has its `rank`, the `rows` of its matrix and its `execution`; None if it stays dense.  `worth` has its `risk`, its
    `next_gain` and its `divergence`, where they are known.
    """
    open_ = [kernel for kernel in plan.kernels if kernel.choices]
    worth = {kernel.name: _worth(kernel) for kernel in open_ if kernel.risk is not None}
    return {"ranks": {kernel.name: _entry(kernel) for kernel in open_}, "worth": worth}


def _worth(kernel: PlannedKernel) -> dict[str, float | None]:
    felt = {} if kernel.divergence is None else {"divergence": kernel.divergence}
    return {"risk": kernel.risk, "next_gain": kernel.next_gain, **felt}


def _entry(kernel: PlannedKernel) -> dict[str, Any] | None:
    if not isinstance(kernel, FactoredKernel):
        return None
    return {"rank": kernel.rank, "rows": list(kernel.view.rows), "execution": kernel.execution}


def from_record(plan: Plan, record: Mapping[str, Any], *, budget: bool) -> Plan:
    """The plan of the same model and rules with the ranks of a record; `worth` may be missing.

    Args:
      plan: by the rules.
      record: from `to_record`.
      budget: whether the ranks were chosen for one, which then is why kernels stay dense.

    Raises:
      ValueError: it is no record of this plan.
    """
    names = {kernel.name for kernel in plan.kernels if kernel.choices}
    ranks, worth = record["ranks"], record.get("worth", {})
    if not isinstance(ranks, Mapping) or ranks.keys() != names:
        raise ValueError("it is of other kernels")
    if not isinstance(worth, Mapping) or not worth.keys() <= names:
        raise ValueError("it has the worth of other kernels")
    kernels = (_decided(kernel, ranks[kernel.name], budget) if kernel.choices else kernel for kernel in plan.kernels)
    kernels = (_with_worth(kernel, worth[kernel.name]) if kernel.name in worth else kernel for kernel in kernels)
    return dataclasses.replace(plan, kernels=tuple(kernels))


def _with_worth(kernel: PlannedKernel, worth: Any) -> PlannedKernel:
    if not isinstance(worth, Mapping) or worth.keys() - {"divergence"} != _WORTH:
        raise ValueError(f"the worth of {kernel.name} is no risk and next_gain")
    if not all(is_number(value) or (value is None and name == "next_gain") for name, value in worth.items()):
        raise ValueError(f"the worth of {kernel.name} is no numbers")
    return dataclasses.replace(kernel, **worth)


def _decided(kernel: PlannedKernel, entry: Any, budget: bool) -> PlannedKernel:
    note = kernel.note if kernel.execution == "premerged" else ""
    if entry is None:
        return DenseKernel(**kernel.shared, execution=kernel.execution, note=_why_dense(kernel, note, budget))
    if not isinstance(entry, Mapping) or entry.keys() != {"rank", "rows", "execution"}:
        raise ValueError(f"{kernel.name} has no rank, rows and execution")
    choice, rank = _choice(kernel, entry["rows"]), entry["rank"]
    if type(rank) is not int or rank < 1 or problem(choice, rank):
        raise ValueError(f"{kernel.name} cannot have rank {shown(rank)}")
    if entry["execution"] not in _EXECUTIONS:
        raise ValueError(f"{kernel.name} cannot run {shown(entry['execution'])}")
    return FactoredKernel(
        **kernel.shared, choice=choice, rank=rank, execution=_execution(kernel, entry["execution"]), note=note
    )


def _why_dense(kernel: PlannedKernel, note: str, budget: bool) -> str:
    if isinstance(kernel, OpenKernel):
        reason = f"energy {kernel.rule.energy}: its rank would not be smaller"
        return f"{reason}; {note}" if note else reason
    return (note or "the budget affords it") if budget else kernel.note


def _execution(kernel: PlannedKernel, decided: Execution | None) -> Execution | None:
    """How a kernel runs: as its rule says by now, or else as a budget counted on."""
    if kernel.execution == "premerged":
        return "premerged"
    assert kernel.rule is not None
    if kernel.rule.execution != "auto":
        return kernel.rule.execution
    return None if decided == "premerged" else decided


def _choice(kernel: PlannedKernel, rows: Any) -> Choice:
    for choice in kernel.choices:
        if rows == list(choice.view.rows):
            return choice
    raise ValueError(f"{kernel.name} cannot have the rows {shown(rows)}")
