"""What the training loop adds to the bare jitted step: seconds per step of `lowrank train` over those of the step alone.

    python -m benchmarks.loop_overhead

Both run in turn, on the same compiled function and on synthetic images; the ratio is the median over the rounds.
"""

import collections
import statistics
import tempfile
import time

import jax

from lowrank_jax import config as configs
from lowrank_jax import experiment as experiments
from lowrank_jax.data import datasets
from lowrank_jax.data.pipeline import TrainBatches, train_iterator
from lowrank_jax.sharding import put_batch
from lowrank_jax.train import train

STEPS, ROUNDS = 300, 5


def settings() -> configs.Config:
    """ResNet-8 on 16x16 images: a step of a few tens of milliseconds on two cores."""
    given = configs.default()
    given.steps = STEPS
    given.batch_size = 64
    given.dataset.name = "synthetic"
    given.dataset.kwargs = {"image_shape": (16, 16, 3)}
    given.log.every = "50 steps"
    given.eval.every = f"{10 * STEPS} steps"
    given.checkpoint.every = f"{10 * STEPS} steps"
    return configs.parse(given, devices=jax.device_count())


def bare_seconds(config: configs.Config) -> float:
    """A step's time with one batch that already lies on the device."""
    experiment = experiments.build(config)
    step = experiment.compile_train_step()
    state = experiment.init()
    arrays = datasets.load(experiment.dataset, config.dataset.train_split, None)
    batch = put_batch(next(train_iterator(TrainBatches(arrays, config.batch_size, STEPS, 0))), experiment.mesh)
    state, _ = jax.block_until_ready(step(state, batch))
    in_flight = collections.deque()
    begin = time.perf_counter()
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        in_flight.append(metrics["loss"])
        if len(in_flight) > 2:  # as far ahead of the device as the loop goes
            in_flight.popleft().block_until_ready()
    jax.block_until_ready(state)
    return (time.perf_counter() - begin) / STEPS


def loop_seconds(config: configs.Config) -> float:
    """A step's time inside `train`, as it logs it, without the first window."""
    with tempfile.TemporaryDirectory() as folder:
        logged = train(config, folder).train
    windows = [config.batch_size / scalars["train/images_per_second"] for _, scalars in sorted(logged.items())]
    return statistics.mean(windows[1:])


def main() -> None:
    config = settings()
    pairs = [(bare_seconds(config), loop_seconds(config)) for _ in range(ROUNDS)]
    ratios = sorted(loop / bare for bare, loop in pairs)
    bare, loop = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"step in the loop {loop:.2f} ms, bare step {bare:.2f} ms on {jax.devices()[0].platform};"
        f" ratio {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f} over {ROUNDS} rounds)"
    )


if __name__ == "__main__":
    main()
