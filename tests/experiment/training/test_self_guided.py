"""A run that begins with dense guides beside its factors."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lr
import lowrank_jax.experiment as lx
from lowrank_jax.experiment.config import ConfigError
from lowrank_jax.experiment.guided import GUIDE, is_guided, without_guides
from lowrank_jax.experiment.hosts.sharding import make_mesh, put_batch
from lowrank_jax.experiment.network import Network
from lowrank_jax.experiment.training import build, start, step
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.mixing import Mixing, normalizer
from lowrank_jax.experiment.training.phases import Phases, phases_of
from lowrank_jax.experiment.training.result import TrainResult
from lowrank_jax.experiment.training.switch import unguided
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import named_leaves
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

GUIDED = {
    "lowrank__self_guided": "14 steps",
    "lowrank__budget": {"params": 0.6},
    "lowrank__moment_batches": 2,
    "model__kwargs": {"widths": (16,), "batch_norm": True, "dropout": 0.2},
    "optim__ema_decay": 0.5,
    "eval__every": "10 steps",
    "log__tensorboard": False,
}


def trained(folder: pathlib.Path, devices: int, stop: running.Stop | None = None, **changes: Any) -> TrainResult:
    """A run on so many of the eight devices that there are."""

    def made(data: int, fsdp: int, model: int, given: Any) -> Any:
        return make_mesh(data, fsdp, model, given or jax.devices()[:devices])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", made)
        return train(running.config(**GUIDED, **changes), str(folder), stop=stop)


@pytest.fixture(scope="module", params=[8, 1])
def devices(request):
    return request.param


@pytest.fixture(scope="module")
def whole(tmp_path_factory, devices):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, trained(folder, devices)


def test_a_run_ends_as_the_low_rank_network_of_its_budget(whole):
    folder, run = whole
    record = json.loads((folder / "ranks.json").read_text())
    assert record["step"] == 0 and int(run.state.step) == 40
    pairs = named_leaves(run.state.params, is_leaf=is_low_rank)
    ranks = {name: entry["rank"] for name, entry in record["ranks"].items() if entry}
    assert ranks and ranks == {name: pair.rank for name, pair in pairs.items() if is_low_rank(pair)}
    assert not any(name.endswith(GUIDE) for name in running.arrays(run.state))
    result = json.loads((folder / "result.json").read_text())
    assert result["guided_steps"] == 14 and result["dense_steps"] == 0
    assert result["params"] == sum(leaf.size for leaf in jax.tree.leaves(run.state.params)) <= 0.6 * result["dense_params"]
    overview = (folder / "overview.txt").read_text()
    assert overview.startswith("Self-guided training") and "\nAfter step 14\n" in overview
    losses = [line["train/loss"] for line in running.metrics(folder) if "train/loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("killed", [9, 14, 15, 27])
def test_a_run_that_is_killed_resumes_to_the_same_bits(whole, devices, tmp_path, killed):
    """Before the end of the phase, at it (its checkpoint is there, the next phase has not begun), right after, and later."""
    often = {"checkpoint__every": "5 steps"}
    with running.dying_after(killed):
        trained(tmp_path / "run", devices, **often)
    running.assert_same(trained(tmp_path / "run", devices, **often).state, whole[1].state)


@pytest.fixture(scope="module")
def stopped(devices, tmp_path_factory):
    """A run that was stopped in the phase, which its last state shows."""
    folder, stop, placed = tmp_path_factory.mktemp("stopped") / "run", running.Stop(), []

    def count(*args):
        placed.append(1)
        stop.requested = len(placed) >= 10
        return put_batch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_jax.experiment.training.loop.put_batch", count)
        run = trained(folder, devices, stop)
    assert run.interrupted and int(run.state.step) == 10
    return folder, run


def test_guides_are_kept_with_what_the_optimiser_has_for_them(stopped):
    _, run = stopped
    guides = {name for name in running.arrays(run.state) if name.endswith(f"/{GUIDE}")}
    assert {name.split("/")[0] for name in guides} == {"params", "opt_state"}  # no averages of them


def test_what_is_evaluated_in_the_phase_is_the_low_rank_network_alone(whole, stopped):
    folder, run = stopped
    net = lx.restore(folder, step=10, raw=True)
    pairs = named_leaves(run.state.params, is_leaf=is_guided)
    kernels = {name: pair for name, pair in pairs.items() if is_guided(pair)}
    restored = named_leaves(net.variables["params"], is_leaf=is_low_rank)
    assert kernels and net.plan.factored
    for name, pair in kernels.items():
        assert float(jnp.abs(pair.guide - pair.merge()).max()) > 1e-4  # it is something else by now
        assert not is_guided(restored[name])
        np.testing.assert_array_equal(restored[name].u, pair.u)
        np.testing.assert_array_equal(restored[name].v, pair.v)
    images = np.random.default_rng(0).integers(0, 256, (16, *net.dataset.image_shape)).astype(net.dataset.image_dtype)
    normalized = normalizer(net.dataset.mean, net.dataset.std)(images)
    np.testing.assert_allclose(net(images), lr.apply(net.model, net.variables, normalized, train=False), atol=1e-5)
    evaluated = lx.evaluate(folder, step=10)
    logged = next(line for line in running.metrics(whole[0]) if line["step"] == 10 and "eval/top1" in line)
    assert evaluated.metrics["top1"] == logged["eval/top1"] and evaluated.raw_metrics["top1"] == logged["eval_raw/top1"]
    assert evaluated.params == net.plan.params < net.plan.dense_params


@pytest.mark.parametrize("changes", [{}, {"optim__name": "adamw"}, {"optim__frobenius_decay": 1e-3}])
def test_after_the_phase_all_but_the_guides_is_as_it_was(changes):
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2}
    phases = phases_of(running.config(**GUIDED, **mesh, **changes))
    state = _drawn(phases)
    after = unguided(phases.last, state)
    assert jax.tree.structure(after) == jax.tree.structure(phases.last.shapes)
    for leaf, shape in zip(jax.tree.leaves(after), jax.tree.leaves(phases.last.shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    before = {name: leaf for name, leaf in running.arrays(state).items() if not name.endswith(f"/{GUIDE}")}
    assert len(before) < len(running.arrays(state))
    for old, new in zip(before.values(), running.arrays(after).values(), strict=True):
        np.testing.assert_array_equal(new, old)


def _drawn(phases: Phases) -> Any:
    """A state of the first phase in which all arrays differ."""
    assert phases.first is not None
    leaves, structure = jax.tree.flatten(phases.first.shapes)
    rng = np.random.default_rng(0)
    drawn = [jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


LENGTH = 8
PLAIN = Mixing(normalizer((0.5,), (0.25,)), num_classes=6)


@functools.cache
def setup(accumulate: int = 1):
    """A network, its first state with guides, a batch, and the step of plain gradient descent."""
    model = Network(lr.models.build("mlp", num_classes=6, widths=(16,)))
    images, rng = jnp.zeros((1, 4, 4, 1)), np.random.default_rng(0)
    plan = lr.plan(model.module, images, [lr.Rule("head/kernel"), lr.Rule(".*", rank=2)])
    batch = {"image": rng.integers(0, 256, (8, 4, 4, 1), np.uint8), "label": np.arange(8) % 6}
    optimizer, schedule = optax.sgd(1.0), optax.constant_schedule(1.0)
    init = jax.jit(lambda: start.fresh_state(start.guided(start.init_weights(model, plan, images, 0)), optimizer, ema=False))
    update = step.make_train_step(model, optimizer, schedule, PLAIN, accumulate=accumulate, guided_steps=LENGTH)
    return model, init(), batch, jax.jit(update)


def dense_loss(model, batch, params):
    """And its gradient, of the dense network."""
    x = (np.asarray(batch["image"], np.float32) / 255 - 0.5) / 0.25

    def loss(params):
        log_p = jax.nn.log_softmax(model.module.apply({"params": params}, x))
        return -(np.eye(6)[batch["label"]] * log_p).sum(-1).mean()

    return jax.value_and_grad(loss)(params)


def test_the_first_step_is_that_of_the_dense_network_that_the_factors_begin_as():
    model, before, batch, update = setup()
    after, metrics = update(before, batch)
    loss, gradient = dense_loss(model, batch, lr.merge(without_guides(before.params)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    pairs = {name: pair for name, pair in named_leaves(before.params, is_leaf=is_guided).items() if is_guided(pair)}
    assert pairs
    for name, old in pairs.items():
        new = named_leaves(after.params, is_leaf=is_guided)[name]
        np.testing.assert_array_equal(new.u, old.u)
        np.testing.assert_array_equal(new.v, old.v)
        np.testing.assert_array_equal(old.guide, old.merge())
        np.testing.assert_allclose(old.guide - new.guide, named_leaves(gradient)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_in_the_middle_by_hand(accumulate):
    model, first, batch, update = setup(accumulate)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), first.params)
    share = (1 + np.cos(np.pi * 3 / LENGTH)) / 2
    pairs = {name: pair for name, pair in named_leaves(moved, is_leaf=is_guided).items() if is_guided(pair)}
    blend = jax.tree.map(
        lambda leaf: share * leaf.guide + (1 - share) * leaf.u @ leaf.v if is_guided(leaf) else leaf, moved, is_leaf=is_guided
    )
    loss, gradient = dense_loss(model, batch, blend)
    after, metrics = update(dataclasses.replace(first, params=moved, step=jnp.int32(3)), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert pairs
    for name, old in pairs.items():
        new, slope = named_leaves(after.params, is_leaf=is_guided)[name], named_leaves(gradient)[name]
        np.testing.assert_allclose(old.guide - new.guide, share * slope, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(old.u - new.u, (1 - share) * slope @ old.v.T, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(old.v - new.v, (1 - share) * old.u.T @ slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lowrank__self_guided": "40 steps"}, "lowrank.self_guided: 40 steps; training has 40"),
        ({"lowrank__self_guided": "0 steps"}, "lowrank.self_guided: 0 steps; must be above 0"),
        ({"lowrank__self_guided": "often"}, "lowrank.self_guided: 'often'"),
        ({"lowrank__self_guided": "5 steps", "lowrank__dense_warmup": "auto"}, "dense_warmup is set too"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        running.config(**changes)
    assert message in str(error.value)


def test_a_dense_network_has_no_guides():
    phases = phases_of(running.config(lowrank__self_guided="5 steps", lowrank__method="none"))
    assert phases.first is None and phases.at(1) is phases.last
