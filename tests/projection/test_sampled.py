import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.projection import matrix as projection
from lowrank_jax.projection import sampled
from lowrank_jax.projection.sampled import Stack
from tests.projection.test_matrix import relative_risk

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("n", "m", "rank", "group", "activation"), [(64, 96, 6, 1, "relu"), (96, 32, 3, 1, "silu"), (24, 60, 4, 3, "relu")]
)
def test_sampling_comes_within_a_hundredth_of_the_closed_form(n, m, rank, group, activation):
    w = jax.random.normal(KEY, (n, m)) * np.sqrt(2 / n)
    sampled = lr.function_approximation(KEY, w, rank, activation=activation, group=group)
    closed = projection.kernel_projection(w, rank, activation=activation, group=group)
    spectral = projection.spectral(w, rank)
    theirs, ours, start = (relative_risk(w, f, activation=activation, group=group) for f in (sampled, closed, spectral))
    assert theirs < 1.01 * ours
    assert theirs < start - 0.5 * (start - ours)


def test_samples_of_the_inputs_are_what_it_serves():
    n, m, rank = 32, 48, 4
    w = jax.random.normal(KEY, (n, m)) / np.sqrt(n)
    mix = jax.random.normal(jax.random.key(1), (n, n)) * jnp.geomspace(1, 0.01, n)[:, None]
    draw = jax.random.normal(jax.random.key(2), (2, 4000, n)) @ mix
    served, unseen = draw[0], draw[1]

    def loss(factors):
        u, v = factors
        return float(jnp.mean(jnp.sum((jax.nn.relu(unseen @ w) - jax.nn.relu(unseen @ u @ v)) ** 2, -1)))

    fitted = loss(lr.function_approximation(KEY, w, rank, inputs=served[:, None]))
    assert fitted < 0.5 * loss(lr.function_approximation(KEY, w, rank))


def test_kernels_of_several_shapes_go_together_as_they_go_alone():
    wide, tall = jax.random.normal(KEY, (8, 20)), jax.random.normal(KEY, (16, 6))
    keys = jax.random.split(KEY, 2)
    both = sampled.approximate([Stack(keys[:1], wide[None], 2), Stack(keys[1:], tall[None], 3)], steps=50)
    for key, w, rank, (u, v) in zip(keys, (wide, tall), (2, 3), both, strict=True):
        a, b = lr.function_approximation(key, w, rank, steps=50)
        np.testing.assert_allclose(u[0] @ v[0], a @ b, atol=1e-4)


def test_a_zero_kernel_stays_zero():
    u, v = lr.function_approximation(KEY, jnp.zeros((4, 6)), 2, steps=3)
    np.testing.assert_array_equal(u @ v, 0)


def test_bad_input_gets_one_clear_error():
    w = jnp.ones((4, 6))
    with pytest.raises(ValueError, match="rank 5 of a 4x6 matrix"):
        lr.function_approximation(KEY, w, 5)
    with pytest.raises(ValueError, match=r"inputs must be \[samples, 1, 4\], got \[9, 4\]"):
        lr.function_approximation(KEY, w, 2, inputs=jnp.ones((9, 4)))
    with pytest.raises(ValueError, match="unknown activation"):
        lr.function_approximation(KEY, w, 2, activation="rleu")
