"""The execution of factor pairs, changed in parameters and in whatever an optimiser or an average keeps beside them."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

from lowrank_jax.kernel import Execution, is_low_rank
from lowrank_jax.paths import map_named
from lowrank_jax.planning.plans import FactoredKernel, Plan
from lowrank_jax.text import did_you_mean


def with_execution(tree: Any, execution: Execution | Plan) -> Any:
    """The same tree with factor pairs that say another execution; the arrays stay, and so does the function.

    A tree of pairs that run `merged` and one of pairs that run `factored` have different structures.  So where a run goes on in
    another way, its parameters and the optimiser's state are relabelled together:

        params, opt_state = lr.with_execution((params, opt_state), plan)

    Args:
      tree: any tree with `LowRankKernel`s in it: parameters, gradients, an optimiser's state.
      execution: one for all pairs, of which those that are `premerged` stay so, as something besides their layer may read them;
        or a plan, which says it for its own kernels: for pairs whose names end with theirs.  Where it is open there, pairs that
        are not `premerged` become `factored`.  Other pairs stay as they are.

    Raises:
      ValueError: there is no such execution, the tree has none of the plan's kernels, or one with other rows.
    """
    if not isinstance(execution, Plan):
        if execution not in get_args(Execution):
            raise ValueError(f"unknown execution {execution!r}{did_you_mean(execution, get_args(Execution))}")
        return map_named(lambda _, leaf: _relabelled(leaf, execution), tree, is_leaf=is_low_rank)
    plan, seen = execution, set()
    find = finder(plan)

    def relabel(name: str, leaf: Any) -> Any:
        kernel = find(name) if is_low_rank(leaf) else None
        if kernel is None:
            return leaf
        seen.add(kernel.name)
        if leaf.rows != kernel.view.rows:
            raise ValueError(f"{name}: is a pair with rows {leaf.rows}, the plan has rows {kernel.view.rows}: factorize anew")
        if kernel.execution is None:
            return _relabelled(leaf, "factored")
        return dataclasses.replace(leaf, execution=kernel.execution)

    relabelled = map_named(relabel, tree, is_leaf=is_low_rank)
    if plan.factored and not seen:
        raise ValueError(
            f"none of the plan's factored kernels is a factor pair of this tree, {plan.factored[0].name!r} for one"
        )
    return relabelled


def _relabelled(leaf: Any, execution: Execution) -> Any:
    return dataclasses.replace(leaf, execution=execution) if is_low_rank(leaf) and leaf.execution != "premerged" else leaf


def finder(plan: Plan) -> Callable[[str], FactoredKernel | None]:
    """Finds the factored kernel that a leaf belongs to: its name ends with the kernel's, as in "0/mu/dense/kernel"; or None."""
    kernels = {kernel.name: kernel for kernel in plan.factored}

    def find(name: str) -> FactoredKernel | None:
        parts = name.split("/")
        return next((kernels[end] for i in range(len(parts)) if (end := "/".join(parts[i:])) in kernels), None)

    return find
