"""From a dense model's parameters to low-rank ones and back: plan, factorize, merge."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax import discover
from lowrank_jax.kernel import MatrixView, is_low_rank
from lowrank_jax.layers import takes_factors
from lowrank_jax.methods import METHODS
from lowrank_jax.paths import first_match, map_named, named_leaves
from lowrank_jax.plans import Plan, PlannedKernel
from lowrank_jax.ranks import Rule, wanted_rank


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
    others = [name for name, leaf in leaves.items() if name not in uses and _is_matrix(name, leaf)]
    names = [*uses, *others]  # in the order of use
    matches = first_match([rule.path for rule in rules], names)
    first = jax.tree.leaves(inputs)[0]
    batch = first.shape[0] if first.ndim else 1

    kernels = []
    for name in names:
        index = matches[name]
        rule = None if index is None else rules[index]
        kernels.append(_plan_kernel(name, leaves[name].shape, uses.get(name), rule, index, batch))
    _check_ranks(rules, kernels)
    kernels = _without_wrapped(model, inputs, kwargs, variables, kernels)
    low_rank = [leaf for leaf in leaves.values() if is_low_rank(leaf)]
    plain = sum(leaf.size for name, leaf in leaves.items() if name not in matches and not is_low_rank(leaf))
    return Plan(tuple(kernels), plain + sum(leaf.u.size + leaf.v.size for leaf in low_rank))


def _is_matrix(name: str, leaf: Any) -> bool:
    """Whether a parameter has a line of its own in a plan."""
    return not is_low_rank(leaf) and leaf.ndim >= 2 and name.rsplit("/", 1)[-1] not in ("bias", "scale")


def _without_wrapped(model, inputs, kwargs, variables, kernels: list[PlannedKernel]) -> list[PlannedKernel]:
    """Keeps kernels dense whose layer turns out not to run on factors."""

    leaves = named_leaves(variables["params"], is_leaf=is_low_rank)

    def runs_with(chosen: list[PlannedKernel]) -> bool:
        factored = {kernel.name: _factor_shapes(kernel, leaves[kernel.name].dtype) for kernel in chosen}
        params = map_named(lambda name, leaf: factored.get(name, leaf), variables["params"], is_leaf=is_low_rank)
        return takes_factors(model, inputs, kwargs, {**variables, "params": params})

    factored = [kernel for kernel in kernels if kernel.rank is not None]
    if not factored or runs_with(factored) or not runs_with([]):  # a model that fails anyway will say so itself
        return kernels
    wrapped = {kernel.name for kernel in factored if not runs_with([kernel])}
    note = "what wraps its layer does not run on factors"
    return [
        dataclasses.replace(kernel, view=None, rank=None, note=note, planned_macs=kernel.macs)
        if kernel.name in wrapped
        else kernel
        for kernel in kernels
    ]


def _factor_shapes(kernel: PlannedKernel, dtype: Any) -> Any:
    """The factor pair that a kernel will become, as shapes."""
    view, rank = kernel.view, kernel.rank
    assert view is not None and rank is not None
    stack = kernel.shape[: len(kernel.shape) - len(view.shape)]
    return jax.eval_shape(
        lambda: view.from_factors(jnp.zeros((*stack, view.n, rank), dtype), jnp.zeros((*stack, rank, view.m), dtype))
    )


def _plan_kernel(name, shape, use, rule, index, batch) -> PlannedKernel:
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
    return PlannedKernel(name, tuple(shape), view, rank, rule, "", macs=macs, planned_macs=planned)


def _check_ranks(rules: Sequence[Rule], kernels: list[PlannedKernel]) -> None:
    """A rank above all that its rule matches is a mistake; above some of it, it is a way to say 'large ones only'."""
    for rule in rules:
        notes = [kernel.note for kernel in kernels if kernel.rule is rule]
        if rule.rank is not None and notes and all("above full rank" in note for note in notes):
            raise ValueError(f"rule {rule.path!r}: {notes[0]}, and so it is for every kernel that the rule matches")


def factorize(params: Any, plan: Plan, *, key: jax.Array) -> Any:
    """Replaces planned kernels by factor pairs, each made by its rule's method; paths stay what they were.

    Kernels of one shape are decomposed together in a `lax.map`, so that each distinct decomposition is compiled once.
    Call it under `jit` or not: it compiles as one program either way.

    Args:
      params: the dense model's parameters.
      plan: from `plan` for the same model.
      key: for methods that draw; every kernel's draw depends on the key and its own name alone.

    Returns:
      The tree with `LowRankKernel`s in it, in the kernels' own dtypes; decompositions run in float32 or better.

    Raises:
      ValueError: the parameters are not those of the plan.
    """
    params = nn.meta.unbox(params)
    leaves = named_leaves(params, is_leaf=is_low_rank)
    _check_tree(leaves, plan)
    factors = _factorize({kernel.name: leaves[kernel.name] for kernel in plan.factored}, plan, key)
    return map_named(lambda name, leaf: factors.get(name, leaf), params)


@functools.partial(jax.jit, static_argnames="plan")
def _factorize(kernels: dict[str, jax.Array], plan: Plan, key: jax.Array) -> dict[str, Any]:
    factors = {}
    for members in _alike(kernels, plan):
        matrices = [view.to_matrix(kernels[kernel.name]).reshape(-1, view.n, view.m) for kernel, view in members]
        keys = [
            jax.random.split(jax.random.fold_in(key, zlib.crc32(kernel.name.encode())), len(stack))
            for (kernel, _), stack in zip(members, matrices, strict=True)
        ]
        kernel, view = members[0]
        assert kernel.rule is not None and kernel.rank is not None
        method = functools.partial(
            METHODS[kernel.rule.method], rank=kernel.rank, activation=kernel.rule.activation, group=view.group
        )
        u, v = jax.lax.map(lambda pair, method=method: method(*pair), (jnp.concatenate(keys), jnp.concatenate(matrices)))
        ends = list(itertools.accumulate(len(stack) for stack in matrices))[:-1]
        for (kernel, view), u_k, v_k in zip(members, jnp.split(u, ends), jnp.split(v, ends), strict=True):
            stack = kernel.shape[: len(kernel.shape) - len(view.shape)]
            factors[kernel.name] = view.from_factors(u_k.reshape(*stack, *u_k.shape[1:]), v_k.reshape(*stack, *v_k.shape[1:]))
    return factors


def _alike(kernels: dict[str, jax.Array], plan: Plan) -> list[list[tuple[PlannedKernel, MatrixView]]]:
    """The plan's factored kernels, those that one compiled decomposition serves together."""
    groups: dict[Any, list[tuple[PlannedKernel, MatrixView]]] = {}
    for kernel in plan.factored:
        view, rule = kernel.view, kernel.rule
        assert view is not None and rule is not None
        alike = (view.n, view.m, view.group, kernel.rank, rule.method, rule.activation, kernels[kernel.name].dtype)
        groups.setdefault(alike, []).append((kernel, view))
    return list(groups.values())


def _check_tree(leaves: dict[str, Any], plan: Plan) -> None:
    problems = []
    for kernel in plan.kernels:
        leaf = leaves.get(kernel.name)
        if leaf is None:
            problems.append(f"{kernel.name}: in the plan, not in the parameters")
        elif is_low_rank(leaf):
            problems.append(f"{kernel.name}: already factored; merge first")
        elif tuple(leaf.shape) != kernel.shape:
            problems.append(f"{kernel.name}: planned as {list(kernel.shape)}, is {list(leaf.shape)}")
    if problems:
        raise ValueError("the parameters are not those of the plan:\n  " + "\n  ".join(problems))


def merge(params: Any) -> Any:
    """The plain model's parameters: every factor pair multiplied out, in float32 or better, at its own path."""
    return jax.tree.map(lambda leaf: leaf.merge() if is_low_rank(leaf) else leaf, params, is_leaf=is_low_rank)
