"""Directions that matrices share, from matrices made of known ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.theory.directions import common_directions

SHAPES = [(3, 1, 1), (5, 2, 2), (7, 4, 6), (6, 6, 6)]  # d, width and matrices: as many as the width, or more


def conditioned(rng, rows, columns):
    """Singular values from 1 to 3."""
    size = min(rows, columns)
    left, right = (np.linalg.qr(rng.standard_normal((length, size)))[0] for length in (rows, columns))
    return left * np.linspace(1, 3, size) @ right.T


def draw(seed, d, width, count):
    """Directions `[d, width]`, and matrices `[count, d, d]` made of them."""
    rng = np.random.default_rng(seed)
    u = conditioned(rng, d, width)
    u /= np.linalg.norm(u, axis=0)
    return u, np.einsum("ij,kj,lj->kil", u, conditioned(rng, count, width), u)


def distance(u, found):
    """The largest difference of elements, order and signs put right."""
    cosines = u.T @ np.asarray(found)
    closest = np.argmax(abs(cosines), axis=1)
    if len(set(closest)) < len(closest):
        return np.inf
    return abs(u - found[:, closest] * np.sign(cosines[np.arange(len(closest)), closest])).max()


def least(u, slices, seed):
    """Of three attempts, as many as the learner often has: the starts of one may all end in one local minimum."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return min(distance(u, common_directions(jnp.asarray(slices), u.shape[1], key)) for key in keys)


@given(st.integers(0, 999), st.sampled_from(SHAPES))
def test_directions_of_exact_matrices_are_found(seed, shape):
    u, slices = draw(seed, *shape)
    assert least(u, slices, seed) < 1e-6  # where a sweep moves nothing by more than 1e-8


@given(st.integers(0, 999), st.sampled_from(SHAPES), st.sampled_from([1e-2, 1e-4]))
def test_noise_moves_them_by_no_more_than_its_own_order(seed, shape, noise):
    u, slices = draw(seed, *shape)
    drawn = np.random.default_rng(seed + 1).standard_normal(slices.shape)
    assert least(u, slices + noise * (drawn + drawn.swapaxes(1, 2)) / 2, seed) < 20 * noise


def test_most_single_attempts_suffice():
    missed = 0
    for seed in range(40):
        u, slices = draw(seed, 7, 4, 6)
        missed += distance(u, common_directions(jnp.asarray(slices), 4, jax.random.key(seed))) > 1e-6
    assert missed <= 2


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_the_size_of_the_matrices_does_not_matter(size):
    u, slices = draw(0, 7, 4, 6)
    assert least(u, size * slices, 0) < 1e-6


def test_they_have_length_one_and_are_those_of_the_key():
    _, slices = draw(0, 7, 4, 6)
    found = [common_directions(jnp.asarray(slices), 4, jax.random.key(key)) for key in (3, 3, 4)]
    np.testing.assert_allclose(jnp.linalg.norm(found[0], axis=0), 1, rtol=1e-12)
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])
