"""One step of training and of evaluation: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lowrank_jax.layers import apply
from lowrank_jax.state import TrainState, key

Metrics = dict[str, jax.Array]


def normalizer(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[jax.Array], jax.Array]:
    """uint8 images to float32 of mean 0 and deviation 1 per channel, given those of pixels in [0, 1]."""
    return lambda images: (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    normalize: Callable[[jax.Array], jax.Array],
    *,
    label_smoothing: float = 0.0,
    seed: Any = 0,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """A function `(state, batch) -> (state, metrics)`.

    The metrics `loss` and `top1` are means over the batch from before the update; `grad_norm` is the norm of the gradient and
    `lr` the learning rate of the update.
    """

    def loss_fn(params: Any, state: TrainState, batch: dict[str, jax.Array]):
        logits, updates = apply(
            model,
            {"params": params, "batch_stats": state.batch_stats},
            normalize(batch["image"]),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key(seed, "dropout", state.step)},
        )
        logits = logits.astype(jnp.float32)
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        top1 = (logits.argmax(-1) == batch["label"]).mean()
        return loss, (updates.get("batch_stats", {}), top1)

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        (loss, (batch_stats, top1)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "top1": top1, "grad_norm": optax.tree.norm(grads), "lr": schedule(state.step)}
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return train_step


def make_eval_step(
    model: nn.Module, normalize: Callable[[jax.Array], jax.Array]
) -> Callable[[Any, Any, dict[str, jax.Array]], Metrics]:
    """A function `(params, batch_stats, batch) -> sums` over the examples whose mask is 1."""

    def eval_step(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> Metrics:
        variables = {"params": params, "batch_stats": batch_stats}
        logits = apply(model, variables, normalize(batch["image"]), train=False).astype(jnp.float32)
        label, mask = batch["label"], batch["mask"]
        place = rank_of_label(logits, label)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        # where, not a product: a filled-up example's NaN must not reach the sum.
        return {
            "loss": jnp.where(mask > 0, loss, 0).sum(),
            "top1": jnp.where(mask > 0, place < 1, False).sum(),
            "top5": jnp.where(mask > 0, place < 5, False).sum(),
            "count": mask.sum().astype(jnp.int32),
        }

    return eval_step


def rank_of_label(logits: jax.Array, label: jax.Array) -> jax.Array:
    """How many classes come before the right one, `[batch]`: ties go by index, as in argmax; NaN puts it last."""
    true = jnp.take_along_axis(logits, label[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1])
    ahead = (logits > true) | ((logits == true) & (index < label[:, None]))
    return jnp.where(jnp.isnan(logits).any(-1), logits.shape[-1], ahead.sum(-1))
