import jax
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.projection import sampled
from lowrank_jax.projection.stack import Stack
from tests.projection import reference
from tests.projection.reference import normal

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("n", "m", "rank", "group", "activation"),
    [
        (24, 60, 4, 3, "relu"),
        pytest.param(64, 96, 6, 1, "relu", marks=pytest.mark.slow),
        pytest.param(96, 32, 3, 1, "silu", marks=pytest.mark.slow),
    ],
)
def test_sampling_comes_within_a_hundredth_of_the_closed_form(n, m, rank, group, activation):
    w = normal(0, n, m) * np.float32(np.sqrt(2 / n))
    factors = lr.function_approximation(KEY, w, rank, activation=activation, group=group)
    u, v = (np.asarray(factor, np.float64) for factor in factors)
    made = u @ v, reference.projected(w, rank, activation, group), reference.spectral(w, rank)
    theirs, ours, start = (reference.risk(w, y, activation, group) for y in made)
    assert theirs < 1.01 * ours
    assert theirs < start - 0.5 * (start - ours)


def test_samples_of_the_inputs_are_what_it_serves():
    n, m, rank = 32, 48, 4
    w = normal(0, n, m) / np.float32(np.sqrt(n))
    mix = normal(1, n, n) * np.geomspace(1, 0.01, n, dtype=np.float32)[:, None]
    served, unseen = normal(2, 2, 4000, n) @ mix

    def loss(y):
        return np.mean(np.sum((np.maximum(unseen @ w, 0) - np.maximum(unseen @ y, 0)) ** 2, -1))

    u, v = lr.function_approximation(KEY, w, rank, inputs=served[:, None])
    # What Gaussian inputs make of it is within a hundredth of the projection, by the test above.
    assert loss(np.asarray(u) @ np.asarray(v)) < 0.5 * loss(reference.projected(w, rank))


@pytest.mark.slow
def test_kernels_of_several_shapes_go_together_as_they_go_alone():
    wide, tall = normal(0, 8, 20), normal(1, 16, 6)
    keys = jax.random.split(KEY, 2)

    @jax.jit
    def together(wide, tall):
        return sampled.approximate([Stack(keys[:1], wide[None], 2), Stack(keys[1:], tall[None], 3)], steps=50)

    for key, w, rank, (u, v) in zip(keys, (wide, tall), (2, 3), together(wide, tall), strict=True):
        a, b = lr.function_approximation(key, w, rank, steps=50)
        np.testing.assert_allclose(np.asarray(u[0]) @ v[0], np.asarray(a) @ b, atol=1e-4)


def test_a_zero_kernel_stays_zero():
    u, v = lr.function_approximation(KEY, np.zeros((4, 6), np.float32), 2, steps=3)
    np.testing.assert_array_equal(u @ v, 0)


def test_bad_input_gets_one_clear_error():
    w = np.ones((4, 6), np.float32)
    with pytest.raises(ValueError, match="rank 5 of a 4x6 matrix"):
        lr.function_approximation(KEY, w, 5)
    with pytest.raises(ValueError, match=r"inputs must be \[samples, 1, 4\], got \[9, 4\]"):
        lr.function_approximation(KEY, w, 2, inputs=np.ones((9, 4), np.float32))
    with pytest.raises(ValueError, match="unknown activation"):
        lr.function_approximation(KEY, w, 2, activation="rleu")
