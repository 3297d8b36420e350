import functools

import jax
import numpy as np
import pytest

from lowrank_jax import projection
from lowrank_jax.projection import ablations, methods
from tests.projection import reference
from tests.projection.reference import normal, relative_risk

W = normal(0, 14, 24)
SPECTRAL_3 = reference.spectral(W, 3)


def product(factors):
    u, v = (np.asarray(factor, np.float64) for factor in factors)
    return u @ v


@functools.cache
def global_scale(activation, rank):
    return product(jax.jit(functools.partial(ablations.spectral_global_scale, rank=rank, activation=activation))(W))


@pytest.mark.parametrize(
    ("activation", "rank"),
    [
        ("relu", 3),
        ("silu", 5),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("relu", 1), ("relu", 5), ("silu", 1)]),
    ],
)
def test_no_other_global_scale_does_better(activation, rank):
    y = global_scale(activation, rank)
    whole = reference.risk(W, 0 * W, activation)
    least = reference.risk(W, y, activation) / whole
    for factor in np.linspace(0, 3, 61):
        assert least <= reference.risk(W, factor * y, activation) / whole + 1e-5
    wanted = reference.spectral(W, rank)
    np.testing.assert_allclose(y / wanted, y[0, 0] / wanted[0, 0], rtol=1e-3)


def test_a_global_scale_has_a_closed_form_for_relu():
    lengths = np.linalg.norm(W, axis=0), np.linalg.norm(SPECTRAL_3, axis=0)
    h = reference.relu_h(lengths[1] / lengths[0])
    scale = np.sum(lengths[0] * lengths[1] * h) / np.sum(lengths[1] ** 2)
    np.testing.assert_allclose(global_scale("relu", 3), SPECTRAL_3 * scale, atol=1e-3)


@pytest.mark.parametrize("group", [1, 3])
def test_column_scales_make_the_spectral_product_that_of_the_projection(group):
    u, v = jax.jit(functools.partial(ablations.spectral_column_scales, rank=4, group=group))(W)
    np.testing.assert_allclose(product((u, v)), reference.projected(W, 4, group=group), atol=5e-5)
    # U is that of the spectral factors: orthogonal columns whose squared lengths are the singular values.
    left, s, _ = np.linalg.svd(W)
    np.testing.assert_allclose(np.abs(left[:, :4].T @ np.asarray(u)), np.diag(np.sqrt(s[:4])), atol=1e-4)


def test_a_random_subspace_has_the_best_lengths_and_nothing_else():
    keys = jax.random.split(jax.random.key(0), 50)
    us, vs = jax.jit(jax.vmap(lambda key: ablations.random_subspace(key, W, 4)))(keys)
    kept = []
    for i, u in enumerate(np.asarray(us, np.float64)):
        rho = np.linalg.norm(np.linalg.qr(u)[0].T @ W, axis=0) / np.linalg.norm(W, axis=0)
        kept.append(np.mean(rho**2))
        whole = 0.5 * np.sum(W**2, axis=0)
        wanted = np.sum(whole * (1 - reference.relu_h(rho) ** 2))
        np.testing.assert_allclose(reference.risk(W, product((us[i], vs[i]))), wanted, rtol=1e-5)
    # A random subspace keeps r / n of a column's square, give or take its deviation over 24 columns and 50 draws.
    np.testing.assert_allclose(np.mean(kept), 4 / 14, atol=0.03)


def test_unit_spectral_has_singular_values_of_one():
    u, v = (np.asarray(factor) for factor in jax.jit(lambda w: ablations.unit_spectral(w, 5))(W))
    np.testing.assert_allclose(np.linalg.svd(u @ v)[1][:5], 1, atol=1e-5)
    left, _, right = np.linalg.svd(W)
    np.testing.assert_allclose(np.linalg.svd(left[:, :5].T @ u)[1], 1, atol=1e-4)
    np.testing.assert_allclose(np.linalg.svd(right[:5] @ v.T)[1], 1, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 8])
def test_random_factors_keep_the_variance_of_the_product(rank):
    w = 0.3 * normal(0, 400, 500)
    us, vs = jax.jit(jax.vmap(lambda key: ablations.random_factors(key, w, rank)))(jax.random.split(jax.random.key(0), 8))
    # A product of r terms has heavy tails: its mean square varies by about sqrt(2 / (n r)) + sqrt(2 / (m r)) a draw.
    np.testing.assert_allclose(np.mean(np.square(np.asarray(us) @ np.asarray(vs))), 0.09, rtol=0.1)


@pytest.mark.parametrize("method", ["spectral_global_scale", "spectral_column_scales", "random_subspace", "random", "spectral"])
def test_the_size_of_a_kernel_does_not_matter(method):
    key = jax.random.key(0)
    u, v = methods.factor(method, key, W, 3)
    for size in (1e25, 1e-20):
        a, b = methods.factor(method, key, np.float32(size) * W, 3)
        # The global scale is found by comparing values, which tell a minimum to half of their digits.
        np.testing.assert_allclose(product((a, b)) / size, product((u, v)), atol=5e-3)
        np.testing.assert_allclose(relative_risk(np.float64(size) * W, (a, b)), relative_risk(W, (u, v)), rtol=1e-3)
        np.testing.assert_allclose(projection.relative_risk(np.float32(size) * W, a @ b), relative_risk(W, (u, v)), rtol=1e-3)
