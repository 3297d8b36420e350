"""What the training loop adds to the bare jitted step.

    python -m benchmarks.loop_overhead

The loop of `lowrank train` and the compiled step by itself, on a batch that already lies on the device, take turns of 10 steps
in one process; a turn of the loop includes reading, augmenting and placing 10 batches and logging once.  The ratio is the
median over the pairs of turns.
"""

import statistics
import tempfile
import time
from typing import Any

import jax

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training import loop as train
from lowrank_jax.experiment.training.phases import phases_of
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.experiment.workdir.writer import Writer

TURN, PAIRS = 10, 40


def settings() -> configs.Config:
    """ResNet-8 on 128 images of 32x32x3: a step of some 100 milliseconds on two cores."""
    given = configs.default()
    given.steps = TURN * (PAIRS + 2)
    given.dataset.name = "synthetic"
    given.log.every = f"{TURN} steps"
    given.eval.every = given.checkpoint.every = "1000 epochs"
    return configs.parse(given, devices=jax.device_count())


def loop_turn(loop: Any) -> float:
    """Seconds of a turn of the loop, in the order of `advance_to_the_end`."""
    begin = time.perf_counter()
    for _ in range(TURN):
        loop.evaluate_if_due()
        loop.save_if_due()
        loop.advance()
        loop.log_if_due()
    return time.perf_counter() - begin


def bare_turn(step: Any, state: Any, batch: Any) -> tuple[float, Any]:
    """Seconds of a turn of the compiled step, with nothing waited for until the end."""
    begin = time.perf_counter()
    for _ in range(TURN):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - begin, state


def main() -> None:
    config = settings()
    phases = phases_of(config)
    experiment = phases.last
    arrays = datasets.load(experiment.dataset, "train", None)
    data = {"train": arrays, "eval": arrays}
    with tempfile.TemporaryDirectory() as name:
        folder = Workdir(name)
        with Writer(folder) as writer, Checkpoints(folder.checkpoints) as checkpoints, train.StopSignal() as stop:
            loop = train.begin(train.Tools(phases, data, folder, writer, checkpoints, stop))
            state, batch = experiment.init(), put_batch(next(loop.feed), experiment.mesh)
            pairs = []
            for _ in range(PAIRS + 1):
                seconds, state = bare_turn(loop.train_step, state, batch)
                pairs.append((seconds, loop_turn(loop)))
    pairs = pairs[1:]  # the first one warms up
    ratios = statistics.quantiles((looped / bare for bare, looped in pairs), n=4)
    bare, looped = (1e3 * statistics.median(column) / TURN for column in zip(*pairs, strict=True))
    print(
        f"step in the loop {looped:.2f} ms, bare step {bare:.2f} ms on {jax.devices()[0].platform}: ratio {ratios[1]:.3f}"
        f" (median of {PAIRS} pairs; quartiles {ratios[0]:.3f} and {ratios[2]:.3f})"
    )


if __name__ == "__main__":
    main()
