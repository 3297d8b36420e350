"""Initialising all of ResNet-50 at scale 0.1: each method's time over that of NumPy's decompositions one by one.

    python -m benchmarks.init_model

The dense kernels are drawn beforehand; the rival is `numpy.linalg.svd` (LAPACK) on the same matrices.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lr
from benchmarks.turns import ratio, take_turns
from lowrank_jax import models
from lowrank_jax.paths import named_leaves

ROUNDS = 5
METHODS = ("spectral", "kernel_projection", "random")


def main() -> None:
    model = models.build("resnet50", num_classes=1000)
    image = jnp.zeros((1, 224, 224, 3))
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    runs, compile_seconds = {}, {}

    def make_plan(method: str) -> lr.Plan:
        return lr.plan(model, image, [lr.Rule("(stem/conv|head)/kernel"), lr.Rule(".*", scale=0.1, method=method)])

    for method in METHODS:
        plan = make_plan(method)
        jitted = jax.jit(lambda params, plan=plan: lr.factorize(params, plan, key=jax.random.key(0)))
        begin = time.perf_counter()
        compiled = jitted.lower(params).compile()
        compile_seconds[method] = time.perf_counter() - begin
        runs[method] = lambda compiled=compiled: jax.block_until_ready(compiled(params))

    leaves = named_leaves(params)
    matrices = [np.asarray(kernel.view.to_matrix(leaves[kernel.name])) for kernel in make_plan(METHODS[0]).factored]
    runs["numpy"] = lambda: [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]

    times = take_turns(runs, ROUNDS)
    shapes = {matrix.shape for matrix in matrices}
    numpy_seconds = statistics.median(times["numpy"])
    print(f"ResNet-50 at scale 0.1: {len(matrices)} kernels of {len(shapes)} shapes; numpy {numpy_seconds:.2f} s")
    for method in METHODS:
        seconds = statistics.median(times[method])
        over = ratio(times, method, "numpy")
        print(f"{method:18} run {seconds:6.2f} s   ratio to numpy {over:.3f}   compile {compile_seconds[method]:5.1f} s")


if __name__ == "__main__":
    main()
