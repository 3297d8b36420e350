"""A model with collections of its own: they are carried from step to step, saved, restored and evaluated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import merge
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training.build import build
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.workdir.digest import digests
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")


class Scaled(nn.Module):
    """Features over the largest singular value of a batch of them, which power iteration follows from step to step."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, *, train=False):
        steps = self.variable("counters", "steps", lambda: jnp.zeros((), jnp.int32))
        direction = self.variable("power", "direction", lambda: jnp.full(16, 0.25))
        y = nn.Dense(16, use_bias=False, name="features")(x.reshape(len(x), -1))
        self.sow("seen", "mean", y.mean())
        sigma = jnp.linalg.norm(y @ direction.value) / jnp.sqrt(len(y)) if train else self._sigma()
        if train and not self.is_initializing():
            new = y.T @ (y @ direction.value)
            steps.value += 1
            direction.value = new / jnp.linalg.norm(new)
        return nn.Dense(self.num_classes, name="head")(y / sigma)

    def _sigma(self):
        return 1 + self.get_variable("power", "direction")[0] ** 2


SETTINGS = {
    "model__name": f"{__name__}:Scaled",
    "model__kwargs": {},
    "steps": 6,
    "dataset__mixup": 0.0,
    "dataset__crop_padding": 0,
    "dataset__flip": False,
    "optim__ema_decay": 0.9,
    "optim__accumulate": 2,
    "eval__every": "3 steps",
    "checkpoint__every": "2 steps",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(running.config(**SETTINGS), str(folder))


def test_a_step_writes_them_for_the_global_batch(whole):
    experiment = build(running.config(**SETTINGS))
    assert experiment.shapes.collections.keys() == {"counters", "power"}  # what is sown is no state
    before = experiment.init()
    kernel = np.asarray(merge(before.params)["features"]["kernel"], np.float64)
    images = np.random.default_rng(0).integers(0, 17, (32, 8, 8, 1), np.uint8)
    batch = put_batch({"image": images, "label": np.arange(32, dtype=np.int32) % 10}, experiment.mesh)
    after, _ = experiment.compile_train_step()(before, batch)
    dataset = experiment.dataset
    x = ((images / 255 - dataset.mean) / dataset.std).reshape(32, -1) @ kernel
    parts = []
    for part in (x[::2], x[1::2]):  # each takes every second example, and starts from the same direction
        new = part.T @ (part @ np.full(16, 0.25))
        parts.append(new / np.linalg.norm(new))
    np.testing.assert_allclose(after.collections["power"]["direction"], np.mean(parts, 0), rtol=1e-4, atol=1e-6)
    assert int(after.collections["counters"]["steps"]) == 1
    assert after.collections["counters"]["steps"].dtype == jnp.int32


def test_they_are_evaluated_with_the_averages_and_with_the_raw_weights(whole):
    folder, run = whole
    evaluation = Evaluator(trust_code=[f"{__name__}:Scaled"]).evaluate(str(folder))
    assert evaluation.metrics == pytest.approx(run.evals[6], rel=1e-5)
    dataset = running.config().description
    arrays = datasets.load(dataset, "test", None)
    x = ((np.asarray(arrays.images) / 255 - dataset.mean) / dataset.std).reshape(len(arrays.labels), -1)
    scale = 1 + float(run.state.collections["power"]["direction"][0]) ** 2
    for metrics, params in ((evaluation.metrics, run.state.ema["params"]), (evaluation.raw_metrics, run.state.params)):
        dense = jax.device_get(merge(params))
        logits = x @ dense["features"]["kernel"] / scale @ dense["head"]["kernel"] + dense["head"]["bias"]
        assert metrics["top1"] == pytest.approx((logits.argmax(-1) == arrays.labels).mean(), abs=2 / 360)


def test_a_stopped_run_resumes_to_the_same_bits(whole, tmp_path):
    stop = running.Stop()

    def at_first(step, evaluated):
        stop.requested = True

    config = running.config(**SETTINGS)
    assert train(config, str(tmp_path), stop=stop, on_evaluation=at_first).interrupted
    resumed = train(config, str(tmp_path))
    assert int(resumed.state.collections["counters"]["steps"]) == 6
    assert digests(resumed.state) == digests(whole[1].state)
    assert resumed.evals[6] == whole[1].evals[6]


def test_a_checkpoint_holds_them(whole):
    assert running.fields_of(whole[0] / "checkpoints" / "6") == {*running.FIELDS, "collections"}
