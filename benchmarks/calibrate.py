"""Calibrating ResNet-50 at 224: time and memory of measuring its layers, over those of as many steps of training.

    python -m benchmarks.calibrate

What is measured are the second moments of every kernel's inputs, or those of its gradients, which a two-sided projection
needs.  Every arm runs in a process of its own, so that its peak of memory is its own; compilation is not counted in
the time, but in the memory.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lr
from lowrank_jax import models

BATCH, ROUNDS, FEW, MANY = 8, 2, 3, 6
TRAINING = "training"
ARMS = (TRAINING, "inputs", "gradients")


class _Timed:
    """The same batch again and again; when each of them was asked for, and the end."""

    def __init__(self, count: int):
        self._count = count
        self.at: list[float] = []

    def __iter__(self) -> Iterator[jax.Array]:
        for _ in range(self._count):
            self.at.append(time.perf_counter())
            yield jnp.ones((BATCH, 224, 224, 3))
        self.at.append(time.perf_counter())


def measure(arm: str, count: int) -> tuple[float, float]:
    """Seconds of a batch, the first one left out as it compiles, and gigabytes at the peak of this process."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    model = models.build("resnet50", num_classes=1000)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    plan = lr.plan(model, jnp.zeros((1, 224, 224, 3)), [lr.Rule(".*kernel", scale=1.0)]).opened()
    runs: dict[str, Callable[[Any], Any]] = {
        TRAINING: lambda batches: _train(model, variables, batches),
        "inputs": lambda batches: lr.inputs.second_moments(model, variables, batches, plan, train=False),
        "gradients": lambda batches: lr.inputs.gradient_moments(
            model, variables, batches, plan, key=jax.random.key(1), train=False
        ),
    }
    batches = _Timed(count)
    jax.block_until_ready(runs[arm](batches))
    turns = [after - before for before, after in zip(batches.at[1:], batches.at[2:], strict=False)]
    return statistics.median(turns), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def _train(model: Any, variables: Any, batches: Any) -> Any:
    optimizer = optax.sgd(0.1, momentum=0.9)
    labels = jnp.arange(BATCH)

    @jax.jit
    def step(variables: Any, state: Any, images: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, written = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), written

        gradients, written = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(variables["params"], updates), **written}, state

    state = optimizer.init(variables["params"])
    for images in batches:
        variables, state = step(variables, state, images)
    return variables


def _in_a_process(arm: str, count: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.calibrate", f"--arm={arm}", f"--batches={count}"]
    seconds, peak = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=FEW, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(*measure(args.arm, args.batches))
        return
    rounds = [{arm: _in_a_process(arm, FEW) for arm in ARMS} for _ in range(ROUNDS)]
    found = {arm: [turn[arm] for turn in rounds] for arm in ARMS}
    of_training = statistics.median(seconds for seconds, _ in found[TRAINING])
    memory = max(peak for _, peak in found[TRAINING])
    print(f"ResNet-50 at 224, batches of {BATCH}; over a step of training")
    for arm in ARMS:
        seconds, peak = statistics.median(seconds for seconds, _ in found[arm]), max(peak for _, peak in found[arm])
        longer = "" if arm == TRAINING else f", {_in_a_process(arm, MANY)[1]:.2f} GiB after {MANY} batches"
        ratios = f"time x {seconds / of_training:.2f}, memory x {peak / memory:.2f}"
        print(f"{arm:10} {seconds:6.2f} s, {peak:5.2f} GiB{longer}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
