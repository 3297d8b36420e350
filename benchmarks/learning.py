"""Learning a ReLU network from samples: seconds to rounding, over those of rivals.

    python -m benchmarks.learning

`L-BFGS` is SciPy's, from the network that moments suggest, A eliminated, on as many samples as Gauss–Newton keeps; it ends
where 1e-10 of the outputs' variance is unexplained, or after ten times our seconds.  `Adam` is optax's, on a student of the
same width from a random start in batches of 512 samples, for ten times our seconds.  What they leave unexplained is told.  In
float64, compiled beforehand.
"""

import contextlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import minimize

from lowrank_jax.theory import draw_network, draw_samples, learn_relu_network, start_from_moments

SIZES = ((20, 10, 10, 100_000), (20, 20, 20, 200_000), (40, 40, 40, 100_000), (20, 10, 1, 100_000))
GOAL = 1e-10
TURNS = 3


def ours(x: jax.Array, y: jax.Array, width: int, seed: int) -> tuple[float, float]:
    begin = time.perf_counter()
    learned = learn_relu_network(x, y, width, key=jax.random.key(seed))
    return time.perf_counter() - begin, learned.residual


@jax.jit
def eliminated(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ w)
    gram = hidden.T @ hidden
    a = jnp.linalg.solve(gram + 1e-14 * jnp.trace(gram) * jnp.eye(len(gram)), hidden.T @ y)
    return jnp.sum((y - hidden @ a) ** 2) / jnp.sum((y - y.mean(axis=0)) ** 2)


value_and_grad = jax.jit(jax.value_and_grad(eliminated))


class _Ended(Exception):
    pass


def lbfgs(x: jax.Array, y: jax.Array, width: int, seed: int, limit: float) -> tuple[float, float]:
    begin = time.perf_counter()
    w = start_from_moments(x, y, width, key=jax.random.key(seed)).w
    kept = max(2**16, 64 * w.size)
    x, y, best = x[:kept], y[:kept], [np.inf]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = value_and_grad(flat.reshape(w.shape), x, y)
        best[0] = min(best[0], float(value))
        if best[0] < GOAL or time.perf_counter() - begin > limit:
            raise _Ended
        return float(value), np.asarray(slope, np.float64).ravel()

    begin_at = np.asarray(w / jnp.linalg.norm(w, axis=0)).ravel()
    with contextlib.suppress(_Ended):
        minimize(loss, begin_at, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 3000, "ftol": 0, "gtol": 0})
    return time.perf_counter() - begin, best[0]


def adam(x: jax.Array, y: jax.Array, width: int, seed: int, seconds: float) -> tuple[float, float]:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = (jax.random.normal(keys[0], (x.shape[1], width)), jax.random.normal(keys[1], (width, y.shape[1])) / width**0.5)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def steps(params: Any, state: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            at = jax.random.randint(key, (512,), 0, len(x))
            slope = jax.grad(lambda p: jnp.mean((y[at] - jax.nn.relu(x[at] @ p[0]) @ p[1]) ** 2))(params)
            change, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, change), state), None

        return jax.lax.scan(step, (params, state), jax.random.split(key, 100))[0]

    state = optimizer.init(params)
    steps(params, state, keys[2])
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        keys = jax.random.split(keys[2], 3)
        params, state = jax.block_until_ready(steps(params, state, keys[0]))
    left = jax.nn.relu(x @ params[0]) @ params[1] - y
    return time.perf_counter() - begin, float(jnp.sum(left**2) / jnp.sum((y - y.mean(axis=0)) ** 2))


def main() -> None:
    for n, width, outputs, count in SIZES:
        print(f"n {n}, m {width}, outputs {outputs}, {count} samples")
        for seed in range(TURNS + 1):
            network = draw_network(jax.random.key(seed), n, width, outputs)
            x, y = jax.block_until_ready(draw_samples(jax.random.key(seed + 1000), network, count))
            seconds, residual = ours(x, y, width, seed)
            rival, left = lbfgs(x, y, width, seed, 10 * seconds)
            if not seed:
                continue  # that compiled
            _, unlearned = adam(x, y, width, seed, 10 * seconds)
            ratio = f"ratio {'' if left < GOAL else 'at most '}{seconds / rival:.2f}"
            print(
                f"  seed {seed}: ours {seconds:.2f} s, residual {residual:.0e}; L-BFGS {rival:.2f} s, {left:.0e}; {ratio}; "
                f"Adam in {10 * seconds:.0f} s: {unlearned:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
