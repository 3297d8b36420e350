"""One kernel by every way to project it: time over that of NumPy's decomposition of it, and relative function risk.

    python -m benchmarks.projections

Kernels are He-normal draws.  All ways take turns in one process; ratios are medians over the turns.  Sampled function
approximation is the reference that the closed form has to match: its time is also told over that of the closed form.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import lowrank_jax as lr
from benchmarks.turns import Times, ratio, take_turns
from lowrank_jax.projection import matrix

TURNS = 5
KERNELS = ((512, 512, 26), (576, 64, 6), (2304, 256, 26))
ACTIVATIONS = ("relu", "silu")


def ways(rank: int, activation: str) -> dict[str, Callable[[jax.Array], Any]]:
    project = functools.partial(matrix.kernel_projection, rank=rank, activation=activation)
    return {
        "spectral": functools.partial(matrix.spectral, rank=rank),
        "top": project,
        "search": functools.partial(project, subspace="search"),
        "refine": functools.partial(project, subspace="refine"),
        "sampled": lambda w: lr.function_approximation(jax.random.key(1), w, rank, activation=activation),
    }


def main() -> None:
    for n, m, rank in KERNELS:
        w = jax.random.normal(jax.random.key(0), (n, m)) * np.sqrt(2 / n)
        host = np.asarray(w)
        for activation in ACTIVATIONS:
            runs: dict[str, Callable[[], Any]] = {"numpy": lambda host=host: np.linalg.svd(host, full_matrices=False)}
            risks, compile_seconds = {}, {}
            whole = matrix.risk(w, 0 * w, activation=activation)
            for name, way in ways(rank, activation).items():
                begin = time.perf_counter()
                compiled = jax.jit(way).lower(w).compile()
                compile_seconds[name] = time.perf_counter() - begin
                u, v = compiled(w)
                risks[name] = float(matrix.risk(w, u @ v, activation=activation) / whole)
                runs[name] = lambda compiled=compiled, w=w: jax.block_until_ready(compiled(w))
            report(f"{n}x{m} at rank {rank}, {activation}", take_turns(runs, TURNS), risks, compile_seconds)


def report(title: str, times: Times, risks: dict[str, float], compile_seconds: dict[str, float]) -> None:
    print(f"{title}; numpy {1e3 * statistics.median(times['numpy']):.1f} ms")
    for name, risk in risks.items():
        seconds = statistics.median(times[name])
        line = f"  {name:9} {seconds:8.4f} s   over numpy {ratio(times, name, 'numpy'):7.2f}"
        line += f"   compile {compile_seconds[name]:5.1f} s   relative risk {risk:.5f}"
        if name == "sampled":
            line += f" = {risk / risks['top']:.4f} of top's, in {ratio(times, name, 'top'):.0f} times its time"
        print(line)


if __name__ == "__main__":
    main()
