"""Means over hidden layers against sampling."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.theory import draw_network, draw_samples, hidden


def test_products_and_variances_are_what_sampling_gives():
    rng = np.random.default_rng(0)
    w, y, a = rng.standard_normal((6, 4)), rng.standard_normal((6, 3)), rng.standard_normal((4, 2))
    y[:, 2] = 0  # a column that is zero computes zero
    x = rng.standard_normal((50, 20_000, 6))
    seen, other = np.maximum(x @ w, 0), np.maximum(x @ y, 0)
    products = np.einsum("psj,psk->pjk", seen, other) / x.shape[1]
    variances = (seen @ a).var(axis=1)
    for found, parts in ((hidden.products(w, y), products), (hidden.variance(w, a), variances)):
        error = parts.std(axis=0, ddof=1) / math.sqrt(len(parts))
        assert (abs(parts.mean(axis=0) - found) <= 5 * error).all()


def test_drawn_networks_have_the_condition_and_the_variance_that_they_should():
    network = draw_network(jax.random.key(0), 12, 6, 3, condition=5.0)
    lengths = jnp.linalg.norm(network.a, axis=1)
    np.testing.assert_allclose(lengths, 1)
    _, y = draw_samples(jax.random.key(1), network, 200_000)
    np.testing.assert_allclose(y.var(axis=0), 1, rtol=0.03)  # six standard deviations of a variance's estimate
    x, y = draw_samples(jax.random.key(2), network, 50)
    np.testing.assert_allclose(y, np.maximum(x @ network.w, 0) @ network.a, rtol=1e-12)
