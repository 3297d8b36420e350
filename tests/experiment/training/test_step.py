import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax import models, plan
from lowrank_jax.experiment.network import Network
from lowrank_jax.experiment.training import start, step
from lowrank_jax.experiment.training.build import build
from lowrank_jax.experiment.training.mixing import Mixing, normalizer
from lowrank_jax.planning.rules import Rule
from tests import running


@functools.cache
def setup(ema=False, **kwargs):
    model = Network(models.build("mlp", num_classes=6, widths=(16, 16), **kwargs))
    images = jnp.zeros((1, 4, 4, 1))
    planned = plan(model.module, images, [Rule("head/kernel"), Rule(".*", rank=2)])
    optimizer = optax.sgd(0.1)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 4, 4, 1), np.uint8),
        "label": np.arange(8) % 6,
        "mask": np.ones(8, np.float32),
    }
    init = jax.jit(lambda: start.fresh_state(start.init_weights(model, planned, images, 0), optimizer, ema=ema))
    return model, optimizer, init(), batch


SCHEDULE = optax.constant_schedule(0.1)
NORMALIZE = normalizer((0.5,), (0.25,))
PLAIN = Mixing(NORMALIZE, num_classes=6)


def test_a_step_is_gradient_descent_on_the_smoothed_loss():
    model, optimizer, before, batch = setup()
    train_step = step.make_train_step(model, optimizer, SCHEDULE, Mixing(NORMALIZE, 6, label_smoothing=0.1))
    after, metrics = jax.jit(train_step)(before, batch)
    x = (np.asarray(batch["image"], np.float32) / 255 - 0.5) / 0.25

    from lowrank_jax import apply, merge

    logits = jax.jit(lambda params: model.module.apply({"params": merge(params)}, x))(before.params)
    targets = 0.9 * np.eye(6)[np.asarray(batch["label"])] + 0.1 / 6
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(metrics["loss"], -(targets * log_p).sum(-1).mean(), rtol=1e-5)

    def loss(params):
        return -(targets * jax.nn.log_softmax(apply(model.module, {"params": params}, x))).sum(-1).mean()

    grads = jax.jit(jax.grad(loss))(before.params)
    expected = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), before.params, grads)
    for ours, theirs in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert int(after.step) == 1


def test_dropout_differs_from_step_to_step_and_repeats_for_one():
    model, optimizer, before, batch = setup(dropout=0.5)
    train_step = jax.jit(step.make_train_step(model, optimizer, SCHEDULE, PLAIN, seed=3))
    first, again = (train_step(before, batch)[1]["loss"] for _ in range(2))
    later = train_step(before.replace(step=np.int32(1)), batch)[1]["loss"]
    assert first == again != later


def test_a_batch_in_parts_takes_the_same_step():
    model, optimizer, before, batch = setup()
    whole, parts = (
        jax.jit(step.make_train_step(model, optimizer, SCHEDULE, PLAIN, accumulate=accumulate))(before, batch)
        for accumulate in (1, 4)
    )
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # sums in another order


def test_batch_norm_normalises_each_part_by_itself():
    model, optimizer, before, batch = setup(batch_norm=True)
    order = np.array([0, 1, 2, 3] * 2)  # part i takes every fourth example from the i-th on: two equal ones
    pairs = {name: value[order] for name, value in batch.items()}
    after, _ = jax.jit(step.make_train_step(model, optimizer, SCHEDULE, PLAIN, accumulate=4))(before, pairs)
    np.testing.assert_allclose(after.batch_stats["norm1"]["var"], 0.9 * before.batch_stats["norm1"]["var"], rtol=1e-4)


def test_every_part_of_a_batch_drops_its_own_units():
    model, optimizer, before, batch = setup(dropout=0.5)
    twins = {name: np.concatenate([value[:1]] * 8) for name, value in batch.items()}
    four, _ = jax.jit(step.make_train_step(model, optimizer, SCHEDULE, PLAIN, accumulate=4))(before, twins)
    # The first part's draws are those of a batch that it is all of; if the others repeated them, this would be the same step.
    one, _ = jax.jit(step.make_train_step(model, optimizer, SCHEDULE, PLAIN))(before, {k: v[:2] for k, v in twins.items()})
    assert not np.allclose(one.params["head"]["kernel"], four.params["head"]["kernel"])


def test_the_average_follows_parameters_and_statistics():
    model, optimizer, current, batch = setup(batch_norm=True, ema=True)
    train_step = jax.jit(step.make_train_step(model, optimizer, SCHEDULE, PLAIN, ema_decay=0.3))
    first = current
    expected = jax.tree.map(np.asarray, current.ema)
    for i in range(1, 6):
        current, _ = train_step(current, batch)
        decay = min(0.3, (1 + i) / (10 + i))  # 2/11, 3/12, 4/13, then 0.3
        now = {"params": current.params, "batch_stats": current.batch_stats}
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new), expected, now)
        for ours, theirs in zip(jax.tree.leaves(current.ema), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not np.allclose(current.batch_stats["norm1"]["mean"], first.batch_stats["norm1"]["mean"])
    assert current.variables()[""]["params"] is current.ema["params"]
    assert current.variables()["_raw"]["params"] is current.params


def test_sums_leave_masked_examples_out_even_if_they_are_nan():
    model, _, before, batch = setup()
    eval_step = jax.jit(step.make_eval_step(model, lambda x: x.astype(jnp.float32)))
    batch = {**batch, "image": batch["image"].astype(np.float32)}
    whole = eval_step({"params": before.params}, batch)
    filled = {
        "image": np.concatenate([batch["image"], np.full((2, 4, 4, 1), np.nan, np.float32)]),
        "label": np.concatenate([batch["label"], np.zeros(2, int)]),
        "mask": np.concatenate([batch["mask"], np.zeros(2, np.float32)]),
    }
    masked = eval_step({"params": before.params}, filled)
    for name in ("loss", "top1", "top5", "count"):
        np.testing.assert_allclose(masked[name], whole[name], rtol=1e-6)


@pytest.mark.slow
def test_no_images_travel_between_devices_but_those_at_the_edges():
    settings = {"dataset__mixup": 0.2, "dataset__cutmix": 1.0, "dataset__random_erasing": 0.5, "optim__accumulate": 2}
    for changes, permitted in (({"optim__accumulate": 2, "dataset__mixup": 0.0}, set()), (settings, {"collective-permute"})):
        text = build(running.config(**changes)).lower_train_step().compile().as_text()
        assert text is not None and "all-reduce" in text
        found = re.findall(r"= \(?f32\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute|reduce-scatter)", text)
        assert {kind for _, kind in found} == permitted
        assert all(shape.startswith("1,") for shape, _ in found)  # an image, or the target of one
