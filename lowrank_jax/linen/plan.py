"""`lowrank_jax.plan`: traces a Linen module and decides for each of its kernels."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.kernel import is_low_rank
from lowrank_jax.linen import discover
from lowrank_jax.linen.layers import takes_factors
from lowrank_jax.paths import first_match, map_named, named_leaves
from lowrank_jax.planning.decide import check_ranks, is_matrix, plan_kernel
from lowrank_jax.planning.plans import DenseKernel, FactoredKernel, Plan, PlannedKernel
from lowrank_jax.planning.rules import Rule


def plan(model: nn.Module, inputs: Any, rules: Sequence[Rule], **kwargs: Any) -> Plan:
    """Decides for every kernel of a model which rank it gets, or why it stays dense.  Nothing is computed.

    Args:
      model: any Linen module.
      inputs: what the model is called on, an array or a tuple of arrays; shapes suffice (`jax.ShapeDtypeStruct`).  The first
        axis of the first one is taken for the batch, by which MACs are divided.
      rules: in order; the first whose path matches a name in full decides.  A kernel that no rule matches stays dense.
      **kwargs: keyword arguments of the model, such as `train=False`.

    Returns:
      A hashable plan; `print(plan)` shows it as a table.

    Raises:
      ValueError: a rule matches no parameter, or its rank is above the full rank of everything that it matches.
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    variables, uses = discover.trace(model, inputs, kwargs)
    leaves = named_leaves(variables.get("params", {}), is_leaf=is_low_rank)
    others = [name for name, leaf in leaves.items() if name not in uses and is_matrix(name, leaf)]
    names = [*uses, *others]  # in the order of use
    matches = first_match([rule.path for rule in rules], names)
    first = jax.tree.leaves(inputs)[0]
    batch = first.shape[0] if first.ndim else 1

    kernels: list[PlannedKernel] = []
    for name in names:
        index = matches[name]
        rule = None if index is None else rules[index]
        kernels.append(plan_kernel(name, tuple(leaves[name].shape), uses.get(name), rule, index, batch))
    check_ranks(rules, kernels)
    kernels = _without_wrapped(model, inputs, kwargs, variables, kernels)
    low_rank = [leaf for leaf in leaves.values() if is_low_rank(leaf)]
    plain = sum(leaf.size for name, leaf in leaves.items() if name not in matches and not is_low_rank(leaf))
    return Plan(tuple(kernels), plain + sum(leaf.u.size + leaf.v.size for leaf in low_rank))


def _without_wrapped(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], variables: Any, kernels: list[PlannedKernel]
) -> list[PlannedKernel]:
    """Keeps kernels dense that something besides their layer reads, which does not know factors."""
    leaves = named_leaves(variables["params"], is_leaf=is_low_rank)

    def runs_with(chosen: list[FactoredKernel]) -> bool:
        pairs = {kernel.name: _factor_shapes(kernel, leaves[kernel.name].dtype) for kernel in chosen}
        params = map_named(lambda name, leaf: pairs.get(name, leaf), variables["params"], is_leaf=is_low_rank)
        return takes_factors(model, inputs, kwargs, {**variables, "params": params})

    factored = [kernel for kernel in kernels if isinstance(kernel, FactoredKernel)]
    # A model that fails without factors too raises its own error later.
    if not factored or runs_with(factored) or not runs_with([]):
        return kernels
    note = "a wrapper reads this kernel and does not accept factors"
    wrapped = {
        kernel.name: DenseKernel(name=kernel.name, shape=kernel.shape, macs=kernel.macs, rule=kernel.rule, note=note)
        for kernel in factored
        if not runs_with([kernel])
    }
    return [wrapped.get(kernel.name, kernel) for kernel in kernels]


def _factor_shapes(kernel: FactoredKernel, dtype: Any) -> Any:
    """The factor pair that a kernel will become, as shapes."""
    view, rank, stack = kernel.view, kernel.rank, kernel.stack
    return jax.eval_shape(
        lambda: view.from_factors(jnp.zeros((*stack, view.n, rank), dtype), jnp.zeros((*stack, rank, view.m), dtype))
    )
