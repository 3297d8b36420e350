"""From a dense model's parameters to low-rank ones."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import map_named, named_leaves
from lowrank_jax.planning.arguments import (
    array_problem,
    check_key,
    check_mapping,
    check_plan,
    gradients_problem,
    moments_problem,
)
from lowrank_jax.planning.plans import FactoredKernel, Plan
from lowrank_jax.projection import linalg
from lowrank_jax.projection.methods import METHODS, SAMPLED, TWO_SIDED, Method
from lowrank_jax.projection.padding import equal
from lowrank_jax.projection.stack import Stack
from lowrank_jax.projection.two_sided import GradientMoments, two_sided_stacks
from lowrank_jax.text import did_you_mean


def factorize(
    params: Any,
    plan: Plan,
    *,
    key: jax.Array,
    moments: Mapping[str, jax.Array] | None = None,
    gradients: Mapping[str, GradientMoments] | None = None,
    inputs: Mapping[str, jax.Array] | None = None,
) -> Any:
    """Replaces the planned kernels of a plain tree by factor pairs; the doors' `factorize` calls it (`linen/factorize.py`).

    Args:
      params: the dense model's parameters, without boxes.  For `jax.ShapeDtypeStruct`s the result is shapes too; whether
        values are finite is not checked then.
      plan, key, moments, gradients, inputs: as for the doors.

    Returns:
      The tree with `LowRankKernel`s in it, in the kernels' own dtypes; decompositions run in float32 or better.

    Raises:
      TypeError: the plan or the key is none, or moments, gradients or inputs are no dict.
      ValueError: the parameters do not match the plan or are not finite, or moments, gradients or inputs do not fit it.
    """
    check_plan(plan)
    check_key(key)
    check_mapping("moments", moments)
    check_mapping("gradients", gradients)
    check_mapping("inputs", inputs)
    data = _Data(moments, gradients, inputs)
    leaves = named_leaves(params, is_leaf=is_low_rank)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
        made = functools.partial(factorize, plan=plan)
        return jax.eval_shape(lambda params, key, data: made(params, key=key, **data._asdict()), params, key, data)
    _check_tree(leaves, plan)
    kernels = {kernel.name: leaves[kernel.name] for kernel in plan.factored}
    _check_finite(kernels)
    _check_data(plan, data)
    factors = _factorize(kernels, plan, key, data)
    return map_named(lambda name, leaf: factors.get(name, leaf), params)


class _Data(NamedTuple):
    """What is known of the layers that the plan's kernels are in, by the kernels' names."""

    moments: Mapping[str, jax.Array] | None
    gradients: Mapping[str, GradientMoments] | None
    inputs: Mapping[str, jax.Array] | None


@functools.partial(jax.jit, static_argnames="plan")
def _factorize(kernels: dict[str, jax.Array], plan: Plan, key: jax.Array, data: _Data) -> dict[str, Any]:
    factors: dict[str, Any] = {}
    known, unknown = [], []  # of those that are premerged nobody knows the inputs
    for kernel in plan.factored:
        (known if any(kernel.name in (given or {}) for given in data[:2]) else unknown).append(kernel)
    for chosen, its in ((known, data), (unknown, _Data(None, None, data.inputs))):
        for method, groups in _by_method(kernels, chosen, data.inputs).items():
            stacks = [_stack(members, kernels, key, data.inputs) for members in groups]
            for members, (u, v) in zip(groups, _pairs(method, stacks, groups, its), strict=True):
                factors.update(_unstacked(members, u, v))
    return factors


def _pairs(method: str, stacks: list[Stack], groups: list[list[FactoredKernel]], data: _Data) -> list[linalg.Pair]:
    """Of stacks whose layers are known, or not."""

    def roots(of: Callable[[str], jax.Array]) -> list[jax.Array]:
        return [jnp.concatenate([linalg.square_roots(of(kernel.name)) for kernel in members]) for members in groups]

    moments, gradients, _ = data
    if method == TWO_SIDED and gradients is not None:
        return two_sided_stacks(stacks, roots(lambda name: gradients[name].rows), roots(lambda name: gradients[name].columns))
    if moments is None:
        return METHODS[method](stacks)
    return _data_aware(METHODS[method], stacks, roots(lambda name: moments[name]))


@linalg.highest_precision
def _data_aware(method: Method, stacks: list[Stack], rs: list[jax.Array]) -> list[linalg.Pair]:
    """With S = RᵀR the inputs of RW are isotropic: it is what the method factors, and U is multiplied by R⁻¹ afterwards."""
    pairs = method([dataclasses.replace(stack, w=r @ stack.w.astype(r.dtype)) for stack, r in zip(stacks, rs, strict=True)])
    us = [linalg.triangular_solves(r, u) for r, (u, _) in zip(rs, pairs, strict=True)]
    balanced = linalg.rebalance(us, [v for _, v in pairs])
    return [(u.astype(stack.w.dtype), v.astype(stack.w.dtype)) for stack, (u, v) in zip(stacks, balanced, strict=True)]


def _by_method(
    kernels: dict[str, jax.Array], chosen: list[FactoredKernel], inputs: Mapping[str, jax.Array] | None
) -> dict[str, list[list[FactoredKernel]]]:
    """The chosen kernels by method; within one, those together that become one `Stack`."""

    def alike(kernel: FactoredKernel) -> Hashable:
        view, rule = kernel.view, kernel.rule
        samples = inputs[kernel.name].shape[-3] if inputs is not None and kernel.name in inputs else 0
        return rule.method, view.n, view.m, view.group, kernel.rank, rule.activation, kernels[kernel.name].dtype, samples

    methods: dict[str, list[list[FactoredKernel]]] = {}
    for members in equal([alike(kernel) for kernel in chosen]):
        together = [chosen[i] for i in members]
        methods.setdefault(together[0].rule.method, []).append(together)
    return methods


def _stack(members: list[FactoredKernel], kernels: dict[str, jax.Array], key: jax.Array, inputs: Any) -> Stack:
    """Kernels of one shape as matrices, those of repeated modules one by one."""
    view, rule, rank = members[0].view, members[0].rule, members[0].rank
    matrices = [kernel.view.to_matrix(kernels[kernel.name]).reshape(-1, view.n, view.m) for kernel in members]
    keys = [
        jax.random.split(jax.random.fold_in(key, zlib.crc32(kernel.name.encode())), len(stack))
        for kernel, stack in zip(members, matrices, strict=True)
    ]
    fed = None
    if inputs is not None:
        fed = jnp.concatenate([inputs[kernel.name].reshape(-1, *inputs[kernel.name].shape[-3:]) for kernel in members])
    return Stack(jnp.concatenate(keys), jnp.concatenate(matrices), rank, rule.activation, view.group, fed)


def _unstacked(members: list[FactoredKernel], u: jax.Array, v: jax.Array) -> dict[str, Any]:
    """The factors of a stack by kernel name."""
    factors, start = {}, 0
    for kernel in members:
        end = start + math.prod(kernel.stack)
        u_k, v_k = (part[start:end].reshape(*kernel.stack, *part.shape[1:]) for part in (u, v))
        factors[kernel.name] = kernel.view.from_factors(u_k, v_k, kernel.execution or "factored")
        start = end
    return factors


def _check_tree(leaves: dict[str, Any], plan: Plan) -> None:
    problems = []
    for kernel in plan.kernels:
        leaf = leaves.get(kernel.name)
        if leaf is None:
            problems.append(f"{kernel.name}: in the plan but not in the parameters")
        elif is_low_rank(leaf):
            problems.append(f"{kernel.name}: already factored; merge first")
        elif problem := array_problem(leaf):
            problems.append(f"{kernel.name}: {problem}")
        elif tuple(leaf.shape) != kernel.shape:
            problems.append(f"{kernel.name}: planned as {list(kernel.shape)}, found {list(leaf.shape)}")
        elif isinstance(kernel, FactoredKernel) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            problems.append(f"{kernel.name}: is {leaf.dtype}, which cannot hold factors")
    if problems:
        raise ValueError("the parameters do not match the plan:\n  " + "\n  ".join(problems))


def _check_finite(kernels: dict[str, jax.Array]) -> None:
    broken = [name for name, kernel in kernels.items() if not linalg.known_finite(kernel)]
    if broken:
        raise ValueError(f"kernels contain non-finite values: {', '.join(broken)}")


def _check_data(plan: Plan, data: _Data) -> None:
    moments, gradients, inputs = data
    if moments is not None and inputs is not None:
        raise ValueError("give moments or inputs, not both; the inputs already determine their moments")
    sampled = [kernel for kernel in plan.factored if kernel.rule.method == SAMPLED]
    if inputs is not None and len(sampled) < len(plan.captured):
        raise ValueError(f"only the method {SAMPLED!r} takes inputs; give moments for the other kernels of this plan")
    two_sided = [kernel for kernel in plan.captured if kernel.rule.method == TWO_SIDED]
    if two_sided and gradients is None:
        raise ValueError(f"the method {TWO_SIDED!r} needs gradients: inputs.gradient_moments measures them")
    if gradients is not None and plan.captured and not two_sided:
        raise ValueError(f"only the method {TWO_SIDED!r} takes gradients, and no kernel of this plan has it")
    problems = []
    for kernel in plan.captured:
        name, stack, n, group = kernel.name, kernel.stack, kernel.view.n, kernel.view.group
        if gradients is not None and kernel.rule.method == TWO_SIDED:
            problem = gradients_problem(gradients.get(name), stack, [kernel.view])
            problems += [f"{name}: {problem}"] if problem else []
        elif moments is not None:
            moment = moments.get(name)
            misfit = _misfit(name, "moments", moment, (*stack, n, n))
            problems += misfit or [f"{name}: {problem}" for problem in [moments_problem(moment)] if problem]
        if inputs is not None:
            fed = inputs.get(name)
            problems += _misfit(name, "inputs", fed, (*stack, None, group, n)) or _unusable(name, fed)
    names = {kernel.name for kernel in (*plan.captured, *plan.opened().captured)}  # a budget may leave some dense
    for name in {**(moments or {}), **(gradients or {}), **(inputs or {})}:
        if name not in names:
            problems.append(f"{name}: has data but is not a kernel that the plan could factor{did_you_mean(name, names)}")
    if problems:
        raise ValueError("\n".join(problems))


def _misfit(name: str, what: str, value: jax.Array | None, shape: tuple[int | None, ...]) -> list[str]:
    if value is None:
        return [f"{name}: has no {what}"]
    if problem := array_problem(value):
        return [f"{name}: {what}: {problem}"]
    fits = len(value.shape) == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape, strict=True))
    wanted = ", ".join("samples" if size is None else str(size) for size in shape)
    return [] if fits else [f"{name}: {what} must have shape [{wanted}], not {list(value.shape)}"]


def _unusable(name: str, inputs: Any) -> list[str]:
    if not inputs.size:
        return [f"{name}: inputs are empty"]
    return [] if linalg.known_finite(inputs) else [f"{name}: inputs contain non-finite values"]
