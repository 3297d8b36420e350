"""Images a second of a low-rank network, its kernels run as the cost model chooses, against the dense one's.

    python -m benchmarks.execution                 # ResNet-18 at 32x32, scale 0.25, batch 128
    python -m benchmarks.execution --scale=0.1 --batch=64

Whole training steps, of `lowrank train`'s own step function, on a batch that already lies on the device; they take turns, and
ratios are medians over the turns.  `merged` and `factored` are the two pure choices.
"""

import argparse
import statistics
from typing import Any

import jax
import numpy as np

from benchmarks.turns import Times, ratio, take_turns
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training.build import Experiment, build

ARMS = ("dense", "auto", "factored", "merged")


def experiment(arm: str, args: argparse.Namespace) -> Experiment:
    given = configs.default()
    given.steps, given.batch_size = 1, args.batch
    given.dataset.name = "synthetic"
    given.model.name, given.model.kwargs = "resnet18", {"stem": "cifar"}
    given.lowrank.scale = args.scale
    given.lowrank.rules = ({"path": "(stem/conv|head)/kernel", "method": "none"},)
    if arm == "dense":
        given.lowrank.method, given.lowrank.rules = "none", ()
    else:
        given.lowrank.execution = arm
    return build(configs.parse(given, devices=jax.device_count()))


class Steps:
    """Training steps of an experiment on one batch."""

    def __init__(self, built: Experiment):
        rng = np.random.default_rng(0)
        size = built.config.batch_size
        images = rng.integers(0, 256, (size, *built.dataset.image_shape), np.uint8)
        labels = rng.integers(0, built.dataset.num_classes, size, np.int32)
        self.batch = put_batch({"image": images, "label": labels}, built.mesh)
        self.state, self.step = built.init(), built.compile_train_step()

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)


def report(times: Times, batch: int) -> None:
    for arm, column in times.items():
        print(f"{arm:9} {batch / statistics.median(column):8.1f} images/s   {ratio(times, 'dense', arm):5.2f} of dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    built = {arm: experiment(arm, args) for arm in ARMS}
    plan = built["auto"].plan
    chosen = sum(kernel.execution == "factored" for kernel in plan.factored)
    print(
        f"resnet18 at 32x32, scale {args.scale:g}, batch {args.batch}: {plan.macs / plan.dense_macs:.3f} of the multiplications"
    )
    print(f"on {jax.devices()[0].platform}; auto runs {chosen} of {len(plan.factored)} kernels factored")
    report(take_turns({arm: Steps(experiment) for arm, experiment in built.items()}, args.turns), args.batch)


if __name__ == "__main__":
    main()
