"""Choosing all ranks of ResNet-50 from a budget: its time over that of factorising the network once the ranks are known.

    python -m benchmarks.allocate

`allocate` decomposes the kernels and solves for the ranks; `factorize` decomposes them and makes the factors.  Both are
compiled.  From shapes alone nothing is decomposed.  And the solver alone, over a thousand kernels, whose curves are known.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Read once, by NumPy's and by jax's decompositions: their threads wait for each other by spinning, so that on a busy machine
# every time is chance.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp

import lowrank_jax as lr
from benchmarks.turns import ratio, take_turns
from lowrank_jax import models

ROUNDS = 3
KERNELS = 1000
BUDGETS: dict[str, dict[str, Any]] = {
    "params": {"params": 0.25},
    "macs": {"macs": 0.5},
    "both": {"params": 0.5, "macs": 0.4},
    "seconds": {"seconds": 0.9, "chip": lr.chips.CHIPS["v5e"], "batch": 64, "itemsize": 2},
    "correlation": {"params": 0.25, "objective": "correlation"},
}


def main() -> None:
    model = models.build("resnet50", num_classes=1000)
    image = jnp.zeros((1, 224, 224, 3))
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    plan = lr.plan(model, image, [lr.Rule(".*kernel", scale=1.0)])
    begin = time.perf_counter()
    lr.allocate(plan, params=0.25)
    print(f"from shapes, the first time in a process: {time.perf_counter() - begin:.2f} s", flush=True)
    _against_factorize(params, plan)
    _of_many(plan)


def _against_factorize(params: Any, plan: lr.Plan) -> None:
    chosen = lr.allocate(plan, params=0.25, variables=params)
    jitted = jax.jit(lambda params: lr.factorize(params, chosen, key=jax.random.key(0)))
    compiled = jitted.lower(params).compile()
    runs: dict[str, Callable[[], Any]] = {
        "factorize": lambda: jax.block_until_ready(compiled(params)),
        "allocate": lambda: lr.allocate(plan, params=0.25, variables=params),
        "from shapes": lambda: lr.allocate(plan, params=0.25),
    }
    times = take_turns(runs, ROUNDS)
    print(f"ResNet-50, a quarter of its parameters: {len(chosen.factored)} of {len(chosen.kernels)} kernels factored")
    for name in runs:
        over = f"   ratio to factorize {ratio(times, name, 'factorize'):.2f}" if name != "factorize" else ""
        print(f"{name:12} {statistics.median(times[name]):6.2f} s{over}")


def _of_many(plan: lr.Plan) -> None:
    """The network's kernels again and again, under other names."""
    copies = -(-KERNELS // len(plan.kernels))
    many = [dataclasses.replace(kernel, name=f"copy{i}/{kernel.name}") for i in range(copies) for kernel in plan.kernels]
    repeated = dataclasses.replace(plan, kernels=tuple(many[:KERNELS]))
    for name, budget in BUDGETS.items():
        begin = time.perf_counter()
        made = lr.allocate(repeated, **budget)
        seconds = time.perf_counter() - begin
        print(f"{KERNELS} kernels, {name:10} {seconds:6.2f} s, {len(made.factored)} factored", flush=True)


if __name__ == "__main__":
    main()
