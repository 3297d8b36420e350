import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import batched, methods
from lowrank_jax.projection import matrix as projection
from lowrank_jax.projection.stack import Stack

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# By rank, group and activation; wide and tall, deficient and zero, of many shapes that are padded to few.
KERNELS = [
    (normal(2, 6, 20), 3, 1, "relu"),
    (normal(1, 20, 6), 6, 1, "silu"),
    (1e-12 * normal(2, 27, 16), 4, 1, "relu"),
    (normal(1, 24, 2) @ normal(1, 2, 9), 5, 1, "relu"),
    (normal(1, 9, 2) @ normal(1, 2, 24), 5, 1, "identity"),
    (np.zeros((1, 12, 10), np.float32), 2, 1, "silu"),
    (normal(2, 12, 3 * 8), 3, 3, "relu"),
    (normal(1, 30, 3 * 4), 3, 3, "silu"),
    (np.linalg.svd(normal(1, 16, 16))[0] * np.geomspace(1, 1e-6, 16, dtype=np.float32), 9, 1, "relu"),
]


def stack(w, rank, group, activation):
    return Stack(jax.random.split(jax.random.key(0), len(w)), jnp.asarray(w), rank, activation, group)


@pytest.mark.parametrize("method", ["kernel_projection", "norm_preserving", "spectral"])
def test_kernels_of_many_shapes_together_are_what_they_are_alone(method):
    for (w, rank, group, activation), (u, v) in zip(
        KERNELS, methods.METHODS[method]([stack(*k) for k in KERNELS]), strict=True
    ):
        assert u.shape == (len(w), w.shape[1], rank) and v.shape == (len(w), rank, w.shape[2])
        size = np.abs(w).max() or 1.0
        for i in range(len(w)):
            a, b = methods.factor(method, jax.random.key(0), jnp.asarray(w[i]), rank, activation=activation, group=group)
            np.testing.assert_allclose(u[i] @ v[i] / size, a @ b / size, atol=2e-5)
            np.testing.assert_allclose(u[i].T @ u[i] / size, v[i] @ v[i].T / size, atol=1e-4)


def test_the_risk_is_that_of_float64():
    together = batched.project([stack(*kernel) for kernel in KERNELS])
    for (w, rank, group, activation), (u, v) in zip(KERNELS, together, strict=True):
        with jax.enable_x64(True):
            wide = jnp.asarray(w[0], jnp.float64)
            a, b = projection.kernel_projection(wide, rank, activation=activation, group=group)
            ours, exact = (
                float(projection.relative_risk(wide, y, activation=activation, group=group))
                for y in (jnp.asarray(u[0], jnp.float64) @ jnp.asarray(v[0], jnp.float64), a @ b)
            )
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-9)


def test_best_lengths_are_found_in_pieces_where_outputs_are_many(monkeypatch):
    stacks = [stack(normal(1, 6, 25), 3, 1, "silu")]
    [(u, v)] = batched.project(stacks)
    monkeypatch.setattr(batched, "_OUTPUTS", 10)
    [(a, b)] = batched.project(stacks)
    np.testing.assert_allclose(u @ v, a @ b, rtol=1e-5, atol=1e-6)  # float32, summed in another order
