"""One kernel, one rule: factored at which rank, or dense for which reason."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lowrank_jax.kernel import is_low_rank
from lowrank_jax.planning.kernel_use import KernelUse
from lowrank_jax.planning.plans import Choice, DenseKernel, FactoredKernel, OpenKernel, PlannedKernel, Traffic
from lowrank_jax.planning.rules import SCHEMES, Rule, rows_view, wanted_rank

_REAL = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)  # what can be decomposed


def is_matrix(name: str, leaf: Any, rules: Sequence[Rule]) -> bool:
    """Whether a parameter has a line of its own in a plan: biases and scales only where a rule with rows calls them so."""
    last = name.rsplit("/", 1)[-1]
    called = last not in ("bias", "scale") or any(rule.rows is not None and last in rule.path for rule in rules)
    return not is_low_rank(leaf) and leaf.ndim >= 2 and called


def plan_kernel(name: str, leaf: Any, use: KernelUse | None, rule: Rule | None, index: int | None, batch: int) -> PlannedKernel:
    """The line of one kernel.

    Args:
      name: the parameter's name.
      leaf: the parameter, for its shape as stored and its dtype.
      use: what tracing saw of it; None where no layer was seen to use it.
      rule: the first rule that matches its name.
      index: that rule's place among the rules.
      batch: the number of examples in the traced batch.
    """
    shape = tuple(leaf.shape)
    macs = -(-use.macs() // batch) if use else 0
    dense = functools.partial(DenseKernel, name=name, shape=shape, macs=macs, rule=rule)
    if leaf.dtype not in _REAL:
        return dense(note=f"{leaf.dtype} is none of {', '.join(jnp.dtype(dtype).name for dtype in _REAL)}")
    if rule is not None and rule.rows is not None:
        try:
            planned = _by_rows(name, shape, use, rule, macs)
        except ValueError as error:
            return dense(note=str(error))
        if planned is not None:
            return planned
    if use is None:
        return dense(note=_unused(name))
    if use.refusal:
        return dense(note=use.refusal)
    if shape[len(shape) - len(use.shape) :] != use.shape:
        return dense(note="stacked along an axis other than the first")
    if rule is None or index is None:
        return dense(note="no rule matches")
    try:
        use.view(rule.scheme)
    except ValueError as error:
        return dense(note=str(error))
    choices = _choices(use, rule, batch)
    execution = None if rule.execution == "auto" else rule.execution
    known = {"name": name, "shape": shape, "macs": macs, "rule": rule, "choices": choices, "execution": execution}
    known |= {"own_run": use.own_run, "normalized": use.normalized}
    if rule.energy is not None:
        return OpenKernel(**known)
    rank = wanted_rank(rule, choices[0].view)
    if rank is None:
        return dense(note=f"kept dense by rule {index + 1}")
    if reason := problem(choices[0], rank):
        return DenseKernel(**known, note=reason)
    return FactoredKernel(**known, choice=choices[0], rank=rank)


def _unused(name: str) -> str:
    kind = "embedding" if name.rsplit("/", 1)[-1] == "embedding" else "no known layer uses it"
    return f"{kind}: a rule with rows=... factors it"


def _by_rows(name: str, shape: tuple[int, ...], use: KernelUse | None, rule: Rule, macs: int) -> PlannedKernel | None:
    """The line of a parameter whose rule names its rows; None if they are those of the known layer that uses it.

    Raises:
      ValueError: the parameter has no such axes.
    """
    stacked = use is not None and shape[len(shape) - len(use.shape) :] == use.shape
    view = rows_view(rule, use.shape if use is not None and stacked else shape)
    if use is not None and stacked and not use.refusal and rule.execution != "premerged" and view == use.view(rule.scheme):
        return None
    choices = (Choice(view, Traffic.unknown()),)
    dense = functools.partial(DenseKernel, name=name, shape=shape, macs=macs, rule=rule)
    rank = wanted_rank(rule, view)
    if rank is None and rule.energy is None:
        return dense(note="the rule has rows and no rank")
    if rule.execution == "factored":
        return dense(note=f"runs on factors in known layers alone; {use.refusal if use else 'no layer is known to use it'}")
    if rank is None:
        return OpenKernel(name=name, shape=shape, macs=macs, rule=rule, choices=choices, execution="premerged")
    if reason := problem(choices[0], rank):
        return dense(note=reason, choices=choices, execution="premerged")
    return FactoredKernel(
        name=name, shape=shape, macs=macs, rule=rule, choices=choices, choice=choices[0], rank=rank, execution="premerged"
    )


def premerged(kernel: PlannedKernel, reason: str) -> PlannedKernel:
    """The line of a kernel that something besides its layer reads: its factors are multiplied out before that."""
    kernel = dataclasses.replace(kernel, normalized=None)  # what reads it may change its outputs
    on_factors = kernel.rule is not None and kernel.rule.execution == "factored"
    if isinstance(kernel, OpenKernel | FactoredKernel):
        if not on_factors:
            return dataclasses.replace(kernel, execution="premerged", note=reason)
        note = f"{reason} and cannot work on factors"
        return DenseKernel(name=kernel.name, shape=kernel.shape, macs=kernel.macs, rule=kernel.rule, note=note)
    if kernel.rule is None or on_factors:
        return dataclasses.replace(kernel, choices=())
    return dataclasses.replace(kernel, execution="premerged", note=f"{kernel.note}; {reason}")


def _choices(use: KernelUse, rule: Rule, batch: int) -> tuple[Choice, ...]:
    """Every scheme that the kernel has, the rule's own first."""
    views = []
    for scheme in sorted(SCHEMES, key=lambda scheme: scheme != rule.scheme):
        try:
            view = use.view(scheme)
        except ValueError:
            continue
        if view not in views:
            views.append(view)
    return tuple(Choice(view, Traffic.traced(batch, use.inputs, use.positions, use.hidden_positions(view))) for view in views)


def problem(choice: Choice, rank: int) -> str:
    """Why a kernel cannot be factored, or is not worth factoring, at this rank; empty if it is."""
    view = choice.view
    if rank > view.full_rank:
        return f"rank {rank} is above full rank {view.full_rank}"
    return f"rank {rank} would not be smaller" if choice.params(rank) >= view.n * view.m else ""


def check_rules(rules: Sequence[Rule], kernels: Sequence[PlannedKernel]) -> None:
    """Refuses what fits none of the kernels that a rule matches; what does not fit some means "the others".

    Raises:
      ValueError: a rank is above the full rank of all of them, or none has the axes that are to be its rows.
    """
    for rule in rules:
        matched = [kernel for kernel in kernels if kernel.rule is rule]
        _check_rank(rule, [kernel.choices for kernel in matched])
        _check_rows(rule, [kernel.shape for kernel in matched])


def _check_rank(rule: Rule, matched: Sequence[tuple[Choice, ...]]) -> None:
    if rule.rank is None or not matched or not all(matched):
        return
    rank = wanted_rank(rule, matched[0][0].view)
    largest = max(choices[0].view.full_rank for choices in matched)
    if rank is not None and rank > largest:
        raise ValueError(f"rule {rule.path!r}: rank {rank} is above full rank {largest}, the largest that it matches")


def _check_rows(rule: Rule, shapes: Sequence[tuple[int, ...]]) -> None:
    problem = ""
    for shape in shapes if rule.rows is not None else ():
        try:
            rows_view(rule, shape)
        except ValueError as error:
            problem = f"rule {rule.path!r}: {list(shape)} {error}"
        else:
            return
    if problem:
        raise ValueError(problem)
