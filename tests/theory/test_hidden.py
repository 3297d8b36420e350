"""Means over hidden layers against sampling."""

import math

import numpy as np

from lowrank_jax.theory import hidden


def test_products_and_variances_are_what_sampling_gives():
    rng = np.random.default_rng(0)
    w, y, a = rng.standard_normal((6, 4)), rng.standard_normal((6, 3)), rng.standard_normal((4, 2))
    y[:, 1], y[:, 2] = -w[:, 0], 0  # one at the other end of an angle, and one that computes zero
    x = rng.standard_normal((50, 20_000, 6))
    seen, other = np.maximum(x @ w, 0), np.maximum(x @ y, 0)
    products = np.einsum("psj,psk->pjk", seen, other) / x.shape[1]
    variances = (seen @ a).var(axis=1)
    for found, parts in ((hidden.products(w, y), products), (hidden.variance(w, a), variances)):
        error = parts.std(axis=0, ddof=1) / math.sqrt(len(parts))
        assert (abs(parts.mean(axis=0) - found) <= 5 * error + 1e-12).all()
