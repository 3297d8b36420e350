"""One step of training and of evaluation: pure functions of state and batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import comparison
from lowrank_jax.experiment import objective as objectives
from lowrank_jax.experiment.guided import blended, share_at, without_guides
from lowrank_jax.experiment.network import Network
from lowrank_jax.experiment.objective import Metric, Objective
from lowrank_jax.experiment.training.mixing import Mixing, Normalize
from lowrank_jax.experiment.training.state import TrainState, key
from lowrank_jax.linen import outputs as layer_outputs

Metrics = dict[str, jax.Array]
Gather = Callable[[Any], Any]


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mixing: Mixing,
    *,
    objective: Objective = objectives.DEFAULT,
    accumulate: int = 1,
    ema_decay: float | None = None,
    seed: Any = 0,
    gather: Gather = lambda params: params,
    guided_steps: int = 0,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """A function `(state, batch) -> (state, metrics)`.

    The metrics are the loss and what the objective measures in training, as means over the batch before the update, the norm of
    the gradient `grad_norm`, and the update's learning rate `lr`.

    Args:
      network, optimizer, schedule, mixing, objective: the parts.
      accumulate: the number of equal parts in which the batch goes through the network, one after the other; gradient and
        collections are means over the parts.  BatchNorm normalises each part separately, and devices exchange gradients after
        each.
      ema_decay: of the running average of parameters and BatchNorm statistics in `state.ema`; None for none.
      seed: of the run.
      gather: gives the parameters the sharding that the network computes with.
      guided_steps: the length of self-guided training; 0 without it.
    """

    def loss_fn(params: Any, state: TrainState, batch: dict[str, jax.Array]):
        params = gather(params)
        if guided_steps:
            params = blended(params, share_at(state.step, guided_steps))
        collections = {"batch_stats": state.batch_stats, **state.collections}
        given = {name: value for name, value in batch.items() if name != "place"}
        part = batch["place"][0]
        images, targets = mixing(jax.random.fold_in(key(seed, "mixing", state.step), part), batch["image"], batch["label"])
        dropout = jax.random.fold_in(key(seed, "dropout", state.step), part)
        outputs, updates = network.step({**collections, "params": params}, images, dropout)
        loss, metrics = objective(outputs, {**given, "image": images, "label": targets}, train=True)
        return loss.mean(), ({**collections, **updates}, {name: _means(metric) for name, metric in metrics.items()})

    def loss_and_grads(state: TrainState, batch: dict[str, jax.Array]):
        return jax.value_and_grad(loss_fn, has_aux=True)(state.params, state, batch)

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        mean_over_parts = _in_parts(loss_and_grads, accumulate, state, batch)
        (loss, (collections, metrics)), grads = mean_over_parts(state, {**batch, "place": jnp.arange(len(batch["label"]))})
        batch_stats = collections.pop("batch_stats")
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        measured = {name: _ratio(*means) for name, means in metrics.items()}
        metrics = {"loss": loss, **measured, "grad_norm": optax.tree.norm(grads), "lr": schedule(state.step)}
        ema = state.ema
        if ema_decay is not None:
            averaged = {"params": without_guides(params), "batch_stats": batch_stats}
            ema = moved_average(ema, averaged, ema_decay, state.step + 1)
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema, collections), metrics

    return train_step


def _means(metric: Metric) -> tuple[jax.Array, ...]:
    """Of a metric, or of its numerators and of its denominators."""
    return (metric[0].mean(), metric[1].mean()) if isinstance(metric, tuple) else (metric.mean(),)


def _ratio(numerator: jax.Array, denominator: jax.Array | None = None) -> jax.Array:
    return numerator if denominator is None else numerator / denominator


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
    network: Network, normalize: Normalize, *, gather: Gather = lambda params: params
) -> Callable[[dict[str, Any], jax.Array], Any]:
    """A function `(variables, images) -> outputs` in float32, as the network is evaluated; `gather` as in training."""

    def forward(variables: dict[str, Any], images: jax.Array) -> Any:
        variables = {**variables, "params": gather(variables["params"])}
        return jax.tree.map(_single, network.apply(variables, normalize(images), train=False))

    return forward


def make_watched_forward(
    network: Network,
    normalize: Normalize,
    kernels: Sequence[str],
    *,
    logits: bool,
    unseen: dict[str, str],
    gather: Gather = lambda params: params,
) -> Callable[[dict[str, Any], jax.Array], comparison.Run]:
    """The same, with what the layers of these kernels return, by example.

    Args:
      network, normalize, gather: as for `make_forward`.
      kernels: names of parameters.
      logits: whether the outputs are logits of a softmax.
      unseen: receives by the kernel's name why its layer's outputs cannot be had.
    """

    def forward(variables: dict[str, Any], images: jax.Array) -> comparison.Run:
        variables = {**variables, "params": gather(variables["params"])}
        normal = normalize(images)
        run = functools.partial(network.apply, variables, normal, train=False)
        returned, layers, left_out = layer_outputs.capture(lambda more: run(mutable=more), kernels, len(images))
        unseen.update(left_out)
        given = tuple(_single(leaf) for leaf in jax.tree.leaves(returned) if jnp.issubdtype(leaf.dtype, jnp.floating))
        return comparison.Run(given, jax.nn.log_softmax(given[0]) if logits else None, layers)

    return forward


def _single(output: jax.Array) -> jax.Array:
    return output.astype(jnp.float32) if jnp.issubdtype(output.dtype, jnp.floating) else output


def make_eval_step(
    network: Network,
    normalize: Normalize,
    *,
    objective: Objective = objectives.DEFAULT,
    gather: Gather = lambda params: params,
    classes: int = 0,
) -> Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, Any]]:
    """A function `(variables, batch) -> sums` of the loss and of every metric over the examples whose mask is 1.

    `count` says over how many, and `NAME/of` is the sum of a metric's own denominators where it has them; `gather` as in
    training.  With a number of `classes`, `tally` holds what `tally` counts.
    """

    def eval_step(variables: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, Any]:
        variables = {**variables, "params": gather(variables["params"])}
        images, mask = normalize(batch["image"]), batch["mask"]
        outputs = network.apply(variables, images, train=False)
        given = {name: value for name, value in batch.items() if name != "mask"}
        loss, metrics = objective(outputs, {**given, "image": images, "weight": mask}, train=False)

        def masked_sum(values: jax.Array) -> jax.Array:
            # where, not a product: a filled-up example's NaN must not reach the sum.
            return jnp.where(mask > 0, values, jnp.zeros_like(values)).sum()

        sums = {"loss": masked_sum(loss)}
        for name, metric in metrics.items():
            numerators, *denominators = metric if isinstance(metric, tuple) else (metric,)
            sums[name] = masked_sum(numerators)
            sums |= {f"{name}{OF}": masked_sum(each) for each in denominators}
        counted = {"tally": tally(outputs, batch["label"], mask, classes)} if classes else {}
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


OF = "/of"
"""After the name of a metric: the sum of its denominators."""
