"""One step of training and of evaluation: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lowrank_jax.experiment import objective as objectives
from lowrank_jax.experiment.objective import Objective
from lowrank_jax.experiment.training.mixing import Mixing, Normalize
from lowrank_jax.experiment.training.state import TrainState, key
from lowrank_jax.linen.layers import apply

Metrics = dict[str, jax.Array]
Gather = Callable[[Any], Any]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mixing: Mixing,
    *,
    objective: Objective = objectives.DEFAULT,
    accumulate: int = 1,
    ema_decay: float | None = None,
    seed: Any = 0,
    gather: Gather = lambda params: params,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """A function `(state, batch) -> (state, metrics)`.

    The metrics are the loss and the objective's first metric, as means over the batch before the update, the norm of the
    gradient `grad_norm`, and the update's learning rate `lr`.

    Args:
      model, optimizer, schedule, mixing, objective: the parts.
      accumulate: the number of equal parts in which the batch goes through the network, one after the other; gradient and
        collections are means over the parts.  BatchNorm normalises each part separately, and devices exchange gradients after
        each.
      ema_decay: of the running average of parameters and BatchNorm statistics in `state.ema`; None for none.
      seed: of the run.
      gather: gives the parameters the sharding that the network computes with.
    """

    def loss_fn(params: Any, state: TrainState, batch: dict[str, jax.Array]):
        params = gather(params)
        written = {"batch_stats": state.batch_stats, **state.collections}
        part = batch["place"][0]
        images, targets = mixing(jax.random.fold_in(key(seed, "mixing", state.step), part), batch["image"], batch["label"])
        logits, updates = apply(
            model,
            {**written, "params": params},
            images,
            train=True,
            mutable=list(written),
            rngs={"dropout": jax.random.fold_in(key(seed, "dropout", state.step), part)},
        )
        logits = logits.astype(jnp.float32)
        metric = objective.metrics[objective.deciding](logits, targets).mean()
        return objective.loss(logits, targets).mean(), ({**written, **updates}, metric)

    def loss_and_grads(state: TrainState, batch: dict[str, jax.Array]):
        return jax.value_and_grad(loss_fn, has_aux=True)(state.params, state, batch)

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        mean_over_parts = _in_parts(loss_and_grads, accumulate, state, batch)
        (loss, (collections, metric)), grads = mean_over_parts(state, {**batch, "place": jnp.arange(len(batch["label"]))})
        batch_stats = collections.pop("batch_stats")
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, objective.deciding: metric, "grad_norm": optax.tree.norm(grads), "lr": schedule(state.step)}
        ema = state.ema
        if ema_decay is not None:
            ema = moved_average(ema, {"params": params, "batch_stats": batch_stats}, ema_decay, state.step + 1)
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema, collections), metrics

    return train_step


def _in_parts(loss_and_grads: Callable[..., Any], parts: int, state: TrainState, batch: dict[str, jax.Array]) -> Any:
    """`loss_and_grads` of so many equal parts of a batch, one after the other, with what it returns as means over them."""
    if parts == 1:
        return loss_and_grads
    mean = optax.microbatching.AccumulationType.MEAN
    accumulator = ((mean, (_accumulators(state), mean)), mean)
    return optax.microbatch(loss_and_grads, argnums=1, microbatch_size=len(batch["label"]) // parts, accumulator=accumulator)


def _accumulators(state: TrainState) -> Any:
    """How the collections of a batch's parts become one: floating-point arrays by their mean, others as the last part has them.

    Every part starts from the same collections, so a counter counts a step once.
    """
    mean = optax.microbatching.AccumulationType.MEAN
    others = jax.tree.map(lambda leaf: mean if jnp.issubdtype(leaf.dtype, jnp.floating) else _LAST, state.collections)
    return {"batch_stats": mean, **others}


def _zeros(value: Any) -> Any:
    return jnp.zeros_like(value)


_LAST = optax.microbatching.Accumulator(
    init=_zeros,
    update=lambda carry, value, index: value,
    finalize=lambda value: value,
    aggregate=lambda values: values,
)


def moved_average(average: Any, new: Any, decay: float, step: jax.Array) -> Any:
    """An exponential moving average after one more step.

    At first it forgets faster: the decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's with `num_updates`.
    """
    young = (1 + step) / (10 + step)
    return optax.incremental_update(new, average, 1 - jnp.minimum(decay, young))


def make_forward(
    model: nn.Module, normalize: Normalize, *, gather: Gather = lambda params: params
) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
    """A function `(variables, images) -> outputs` in float32, as the network is evaluated; `gather` as in training."""

    def forward(variables: dict[str, Any], images: jax.Array) -> jax.Array:
        variables = {**variables, "params": gather(variables["params"])}
        return apply(model, variables, normalize(images), train=False).astype(jnp.float32)

    return forward


def make_eval_step(
    model: nn.Module,
    normalize: Normalize,
    *,
    objective: Objective = objectives.DEFAULT,
    gather: Gather = lambda params: params,
    classes: int = 0,
) -> Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, Any]]:
    """A function `(variables, batch) -> sums` of the loss and of every metric over the examples whose mask is 1.

    `count` says over how many; `gather` as in training.  With a number of `classes`, `tally` holds what `tally` counts.
    """
    forward = make_forward(model, normalize, gather=gather)

    def eval_step(variables: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, Any]:
        logits, mask = forward(variables, batch["image"]), batch["mask"]

        def masked_sum(values: jax.Array) -> jax.Array:
            # where, not a product: a filled-up example's NaN must not reach the sum.
            return jnp.where(mask > 0, values, jnp.zeros_like(values)).sum()

        measures = {"loss": objective.loss, **objective.metrics}
        sums = {name: masked_sum(measure(logits, batch["label"])) for name, measure in measures.items()}
        counted = {"tally": tally(logits, batch["label"], mask, classes)} if classes else {}
        return {**sums, "count": mask.sum().astype(jnp.int32), **counted}

    return eval_step


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array, classes: int) -> dict[str, jax.Array]:
    """How often each class was there, and how often each was taken for each, over the examples whose mask is 1.

    Args:
      logits: `[batch, classes]`; of equal ones the first is the largest, and a row with a NaN predicts nothing.
      labels, mask: `[batch]`.

    Returns:
      `counts` int32 `[classes]`, and `confusion` int32 `[classes, classes]` by the true class and the predicted one.
    """
    seen = (mask > 0).astype(jnp.int32)
    predicts = seen * ~jnp.isnan(logits).any(-1)
    return {
        "counts": jnp.zeros(classes, jnp.int32).at[labels].add(seen),
        "confusion": jnp.zeros((classes, classes), jnp.int32).at[labels, logits.argmax(-1)].add(predicts),
    }
