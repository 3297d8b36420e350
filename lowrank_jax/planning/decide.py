"""One kernel, one rule: factored at which rank, or dense for which reason."""

import functools
from collections.abc import Sequence
from typing import Any

from lowrank_jax.kernel import is_low_rank
from lowrank_jax.planning.plans import PlannedKernel, Traffic
from lowrank_jax.planning.rules import Rule, wanted_rank


def is_matrix(name: str, leaf: Any) -> bool:
    """Whether a parameter has a line of its own in a plan."""
    return not is_low_rank(leaf) and leaf.ndim >= 2 and name.rsplit("/", 1)[-1] not in ("bias", "scale")


def plan_kernel(name, shape, use, rule, index, batch) -> PlannedKernel:
    macs = use.macs() // batch if use else 0
    dense = functools.partial(PlannedKernel, name, tuple(shape), None, None, rule, macs=macs, planned_macs=macs)
    if use is None:
        return dense(note="embedding" if name.rsplit("/", 1)[-1] == "embedding" else "no plain layer was seen to use it")
    if use.refusal:
        return dense(note=use.refusal)
    if tuple(shape[len(shape) - len(use.shape) :]) != use.shape:
        return dense(note="stacked along an axis that is not the first")
    if rule is None:
        return dense(note="no rule matches")
    try:
        view = use.view(rule.scheme)
    except ValueError as error:
        return dense(note=str(error))
    rank = wanted_rank(rule, view)
    if rank is None:
        return dense(note=f"kept dense by rule {index + 1}")
    if rank > view.full_rank:
        return dense(note=f"rank {rank} is above full rank {view.full_rank}")
    if rank * (view.n + view.m) >= view.n * view.m:
        return dense(note=f"rank {rank} would not be smaller")
    planned = use.factored_macs(view, rank) // batch
    traffic = Traffic(use.inputs // batch, use.positions // batch, use.hidden_positions(view) // batch)
    execution = None if rule.execution == "auto" else rule.execution
    return PlannedKernel(name, tuple(shape), view, rank, rule, "", macs, planned, traffic, execution)


def check_ranks(rules: Sequence[Rule], kernels: list[PlannedKernel]) -> None:
    """A rank above all that its rule matches is a mistake; above some of it, it is a way to say 'large ones only'."""
    for rule in rules:
        notes = [kernel.note for kernel in kernels if kernel.rule is rule]
        if rule.rank is not None and notes and all("above full rank" in note for note in notes):
            raise ValueError(f"rule {rule.path!r}: {notes[0]}, and so it is for every kernel that the rule matches")
