"""`lowrank_jax.plan`: traces a Linen module and decides for each of its kernels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.kernel import is_low_rank
from lowrank_jax.linen import discover
from lowrank_jax.linen.model_call import ModelCall
from lowrank_jax.linen.model_check import check_model
from lowrank_jax.linen.readers import foreign_readers
from lowrank_jax.paths import first_match, keys_with_slashes, named_leaves
from lowrank_jax.planning.decide import check_rules, is_matrix, plan_kernel, premerged
from lowrank_jax.planning.kernel_use import KernelUse
from lowrank_jax.planning.plans import Plan, PlannedKernel
from lowrank_jax.planning.rules import Rule
from lowrank_jax.projection.curves import Normalization
from lowrank_jax.text import shown


def plan(
    model: nn.Module,
    inputs: Any,
    rules: Sequence[Rule],
    /,
    *,
    rngs: Any = None,
    also: Sequence[Mapping[str, Any]] = (),
    **kwargs: Any,
) -> Plan:
    """Decides for every kernel of a model which rank it gets, or why it stays dense.  Nothing is computed.

    Args:
      model: any Linen module.
      inputs: what the model is called on: one argument, or a tuple of them.  Arrays and `jax.ShapeDtypeStruct`s anywhere in
        them are traced.  The first axis of the first one is taken for the batch, by which MACs are divided.
      rules: in order; the first whose path matches a name in full decides.  A kernel that no rule matches stays dense.
      rngs: as for `model.apply`; needed only if one key is not enough.
      also: in which other ways the model will be called: changes of the keyword arguments, such as `[{"train": True}]`,
        `{"method": "loss"}` or `{"mutable": ["penalties"]}`.  A kernel runs on factors only where all these calls leave it to
        its layer, and training may read kernels that evaluation does not.
      **kwargs: keyword arguments of the model, such as `train=False`.

    Returns:
      A hashable plan; `print(plan)` shows it as a table.

    Raises:
      TypeError: the model is not a Linen module, or `rules` or `also` is no list of its kind.
      ValueError: a rule matches no parameter, its rank is above the full rank of everything that it matches, or nothing of that
        has the axes that it names as rows.
    """
    check_model(model)
    if not isinstance(also, Sequence) or not all(isinstance(more, Mapping) and _are_names(more) for more in also):
        raise TypeError("also takes a list of dicts, a dict for every call")
    if rngs is not None and not isinstance(rngs, Mapping) and not hasattr(rngs, "dtype"):
        raise TypeError(f"rngs takes a key of jax.random, or a dict of keys, not {shown(rngs)}")
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        raise TypeError(f"rules takes a list of lowrank_jax.Rule, not {shown(rules)}")
    call = ModelCall(model, inputs if isinstance(inputs, tuple) else (inputs,), kwargs, rngs)
    calls = [call, *(dataclasses.replace(call, kwargs={**kwargs, **more}) for more in also)]
    variables = nn.meta.unbox(call.init())
    uses = _in_all_calls([discover.trace(call, variables) for call in calls])
    leaves = named_leaves(variables.get("params", {}), is_leaf=is_low_rank)
    others = [name for name, leaf in leaves.items() if name not in uses and is_matrix(name, leaf, rules)]
    names = [*uses, *others]  # in the order of use
    matches = first_match([rule.path for rule in rules], names)

    kernels: list[PlannedKernel] = []
    for name in names:
        index = matches[name]
        rule = None if index is None else rules[index]
        kernels.append(plan_kernel(name, leaves[name], uses.get(name), rule, index, call.batch()))
    check_rules(rules, kernels)
    for each in calls:
        kernels = _with_premerged(each, variables, kernels)
    low_rank = [leaf for leaf in leaves.values() if is_low_rank(leaf)]
    plain = sum(leaf.size for name, leaf in leaves.items() if name not in matches and not is_low_rank(leaf))
    return Plan(tuple(kernels), plain + sum(leaf.u.size + leaf.v.size for leaf in low_rank), keys_with_slashes(variables))


def _are_names(kwargs: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in kwargs)


def _in_all_calls(calls: Sequence[dict[str, KernelUse]]) -> dict[str, KernelUse]:
    """How kernels are used and how much in the first call, and why they cannot be factored in any of them."""
    first, *others = calls
    found = dict(first)
    for uses in others:
        for name, use in uses.items():
            known = found.get(name)
            if known is None:  # not seen before, which is no reading
                found[name] = dataclasses.replace(use, positions=0, widened=0, inputs=0)
                continue
            normalized = _normalized_in_both(known.normalized, use.normalized)
            found[name] = dataclasses.replace(known, refusal=known.refusal or use.refusal, normalized=normalized)
    return found


def _normalized_in_both(one: Normalization | None, other: Normalization | None) -> Normalization | None:
    """Whatever else reads the output in either call means no."""
    if one is None or other is None:
        return None
    return "together" if "together" in (one, other) else "each"


def _with_premerged(call: ModelCall, variables: Any, kernels: list[PlannedKernel]) -> list[PlannedKernel]:
    """Multiplies the factors out before the model sees them where something besides their layer reads the kernel."""
    leaves = named_leaves(variables.get("params", {}), is_leaf=is_low_rank)
    # No axis is as long as this rank, so that none is taken for the rank's by whoever splits the factors along an axis.
    rank = 1 + max((size for leaf in leaves.values() for size in leaf.shape), default=0)
    pairs = {
        kernel.name: _factor_shapes(kernel, rank, leaves[kernel.name].dtype)
        for kernel in kernels
        if kernel.choices and kernel.execution != "premerged"  # a budget may factor what the rule leaves dense
    }
    reasons = foreign_readers(call, variables, pairs)
    return [premerged(kernel, reasons[kernel.name]) if kernel.name in reasons else kernel for kernel in kernels]


def _factor_shapes(kernel: PlannedKernel, rank: int, dtype: Any) -> Any:
    """The factor pair that a kernel will become, or may, as shapes, at another rank."""
    view, stack = kernel.choices[0].view, kernel.stack
    return jax.eval_shape(
        lambda: view.from_factors(jnp.zeros((*stack, view.n, rank), dtype), jnp.zeros((*stack, rank, view.m), dtype))
    )
