"""How much a model's outputs feel of what each kernel loses."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.comparison import divergences
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.linen.model_check import check_model, check_variables
from lowrank_jax.linen.predictions import call, check_functions, check_predictions, logits_of, written
from lowrank_jax.paths import map_named, named_leaves
from lowrank_jax.planning.arguments import check_batches, check_mapping, check_plan
from lowrank_jax.planning.curves import curves_of_kernels
from lowrank_jax.planning.factorize import factorize
from lowrank_jax.planning.plans import FactoredKernel, Plan, PlannedKernel
from lowrank_jax.projection.methods import TWO_SIDED
from lowrank_jax.projection.two_sided import GradientMoments

_LEAST = 1e-3  # of a relative risk: next to less, rounding would be seen in its place


class _Changed(NamedTuple):
    """A kernel at a low rank.

    Attributes:
      kernel: multiplied out, in the dense kernel's shape.
      loss: what it loses, by itself.
    """

    kernel: jax.Array
    loss: float


def sensitivity(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Any],
    plan: Plan,
    *,
    gradients: Mapping[str, GradientMoments] | None = None,
    logits: Callable[[Any], jax.Array] | None = None,
    rngs: Any = None,
    say: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """How much each kernel's loss counts in the network: for `allocate(..., sensitivity=...)`.

        counts = lr.sensitivity(model, variables, batches, plan)
        plan = lr.allocate(plan, macs=0.5, variables=variables, sensitivity=counts)

    One kernel at a time is projected to its planned rank, or to half of its full one, and the Kullback-Leibler divergence of
    the network's predictions is divided by the kernel's relative risk there.  That is one run of the model for every kernel
    and batch, of one program: the kernels keep their dense shapes.  With gradients it gets two-sided factors, and is divided by
    the divergence that they are expected to have: how many times as much is lost.

    Args:
      model, variables: as for `model.apply`; dense, such as a trained network's.
      batches: what the model is called on, arrays or tuples of arrays.
      plan: from `plan` for the same model.
      gradients: from `inputs.gradient_moments(..., plan.opened())`, for rules of the method `two_sided`.
      logits: from what the model returns, the logits `[..., classes]`; by default it returns them.
      rngs: as for `model.apply`; every run has the same.
      say: is told of each kernel and batch.
      **kwargs: keyword arguments of the model.  What it writes is discarded.

    Returns:
      By the name of every kernel that the plan leaves open to a budget; 0 where nothing is lost or nothing changes.

    Raises:
      TypeError: the model is not a Linen module, what it returns are no logits, or an argument is nothing of its kind.
      ValueError: there are no batches, predictions are not numbers, or the variables do not fit the plan.
    """
    check_model(model)
    check_variables(variables)
    check_batches(batches)
    check_plan(plan)
    check_functions(logits=logits, say=say)
    variables = {**variables, "params": nn.meta.unbox(variables["params"])}
    check_mapping("gradients", gradients)
    changed = _changed_kernels(variables["params"], plan, gradients)

    @jax.jit
    def predict(variables: Any, batch: Any) -> jax.Array:
        returned, _ = call(model, variables, batch, rngs, kwargs, written(variables))
        return jax.nn.log_softmax(logits_of(model, returned, logits))

    divergences = dict.fromkeys(changed, 0.0)
    total = 0
    for index, batch in enumerate(batches):
        dense = predict(variables, batch)
        check_predictions(dense, index, "model")
        count = dense.size // dense.shape[-1]
        for place, (name, other) in enumerate(changed.items()):
            if say is not None:
                say(f"batch {index + 1}, kernel {place + 1} of {len(changed)}: {name}")
            found = float(_mean_divergence(dense, predict(_with(variables, name, other.kernel), batch)))
            if not np.isfinite(found):
                raise ValueError(f"batch {index}: with {name} at a low rank the predictions are not numbers")
            divergences[name] += found * count
        total += count
    if not total:
        raise ValueError("no batches to measure sensitivities on")
    return {name: divergences[name] / total / other.loss if other.loss else 0.0 for name, other in changed.items()}


def _changed_kernels(params: Any, plan: Plan, gradients: Mapping[str, GradientMoments] | None) -> dict[str, _Changed]:
    """Every open kernel at a low rank, made by the method whose loss is known."""
    method = "kernel_projection" if gradients is None else TWO_SIDED
    open_ = [kernel for kernel in plan.kernels if kernel.choices]
    curves = curves_of_kernels(open_, params, gradients=gradients)
    lines, losses = {}, {}
    for kernel in open_:
        line = _at_a_rank(kernel, method)
        curve = curves[kernel.name][line.choices.index(line.choice)]
        if curve is None:
            raise ValueError(f"{kernel.name}: its gradients are of another scheme than the plan's")
        loss = curve.risk if gradients is None else curve.divergence
        least = _LEAST if gradients is None else _LEAST * loss[0]
        while line.rank > 1 and loss[line.rank - 1] < least:
            line = dataclasses.replace(line, rank=line.rank // 2)
        lines[kernel.name], losses[kernel.name] = line, float(loss[line.rank - 1])
    lowered = dataclasses.replace(plan, kernels=tuple(lines.get(kernel.name, kernel) for kernel in plan.kernels))
    made = factorize(params, lowered, key=jax.random.key(0), gradients=gradients)
    factored = named_leaves(made, is_leaf=is_low_rank)
    return {name: _Changed(factored[name].merge(), losses[name]) for name in lines}


def _at_a_rank(kernel: PlannedKernel, method: str) -> FactoredKernel:
    """The kernel at its planned rank or half of its full one."""
    assert kernel.rule is not None  # it has choices
    planned = isinstance(kernel, FactoredKernel)
    choice = kernel.choice if planned else kernel.choices[0]
    rank = kernel.rank if planned else max(1, choice.view.full_rank // 2)
    rule = dataclasses.replace(kernel.rule, method=method)
    return dataclasses.replace(FactoredKernel(**kernel.shared, choice=choice, rank=rank), rule=rule)


def _with(variables: Mapping[str, Any], name: str, kernel: jax.Array) -> dict[str, Any]:
    """The variables with another kernel."""
    params = map_named(lambda other, leaf: kernel if other == name else leaf, variables["params"])
    return {**variables, "params": params}


@jax.jit
def _mean_divergence(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.mean(divergences(one, other))
