"""How faithful a compressed Linen model is to the one that it came from."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lowrank_jax.comparison import Fidelity, Run, Totals, common, compare, misfits
from lowrank_jax.linen.model_check import check_model, check_variables
from lowrank_jax.linen.outputs import capture
from lowrank_jax.linen.predictions import call, check_functions, check_predictions, logits_of, written
from lowrank_jax.planning.arguments import check_batches, check_plan
from lowrank_jax.planning.plans import Plan


def fidelity(
    model: nn.Module,
    dense_variables: Any,
    variables: Any,
    batches: Iterable[Any],
    plan: Plan | None = None,
    *,
    logits: Callable[[Any], jax.Array] | None = None,
    rngs: Any = None,
    say: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Fidelity:
    """Compares a compressed network with the one that it came from, on any examples; labels are not needed.

        params = lr.factorize(variables["params"], plan, key=jax.random.key(0))
        print(lr.fidelity(model, variables, {**variables, "params": params}, batches, plan))

    Both networks run on every batch, the same program twice if their variables are alike, so that a network is exactly as
    faithful to itself as can be.  Batches are read one by one; of each the outputs of the planned layers are held twice, and
    only sums, and two numbers for each example, are kept.

    Args:
      model: as for `apply`.
      dense_variables: of the network that is compared with.
      variables: of the compressed one.  Kernels may be factored in either.
      batches: what the model is called on, arrays or tuples of arrays.
      plan: from `plan` for the same model; the layers of the kernels that it factors are compared.  None for no layers.
      logits: from what the model returns, the logits `[..., classes]`; by default it returns them.
      rngs: as for `apply`; every run has the same.
      say: is told of each batch.
      **kwargs: keyword arguments of the model.  What it writes is discarded.

    Returns:
      Agreement, divergence and relative errors, all computed in float32 or better.  Layers of unknown classes, premerged
      kernels that no known layer has, and stacks that do not let their outputs out are named in `unseen`.

    Raises:
      TypeError: the model is not a Linen module, what it returns are no logits, or an argument is nothing of its kind.
      ValueError: there are no batches, one is empty, or predictions are not numbers.
    """
    check_model(model)
    check_variables(dense_variables, "dense_variables")
    check_variables(variables)
    check_batches(batches)
    if plan is not None:
        check_plan(plan)
    check_functions(logits=logits, say=say)
    kernels = [kernel.name for kernel in plan.factored] if plan is not None else []
    unseen: dict[str, str] = {}

    @jax.jit
    def run(variables: Any, batch: Any) -> Run:
        def with_more(more: list[str]) -> Any:
            return call(model, variables, batch, rngs, kwargs, [*more, *written(variables)])

        returned, layers, left_out = capture(with_more, kernels)
        unseen.update(left_out)
        made = logits_of(model, returned, logits)
        return Run((made,), jax.nn.log_softmax(made), layers)

    totals, index = Totals(), None
    for index, batch in enumerate(batches):
        if say is not None:
            say(f"batch {index + 1}")
        runs = []
        for given, whose in ((dense_variables, "dense network"), (variables, "low-rank network")):
            runs.append(run({**given}, batch))
            check_predictions(runs[-1].predictions, index, whose)
        unseen |= misfits(*runs)
        figures = compare(*common(*runs))
        totals.add(figures, np.ones(len(figures.agreements), bool))
    if index is None:
        raise ValueError("no batches to compare networks on")
    return totals.fidelity(kernels, unseen)
