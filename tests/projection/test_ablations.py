import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import ablations, methods
from lowrank_jax.projection import matrix as projection

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (14, 24))


def relative_risk(factors, **settings):
    u, v = factors
    return float(projection.risk(W, u @ v, **settings) / projection.risk(W, 0 * W, **settings))


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("rank", [1, 5])
def test_no_other_global_scale_does_better(activation, rank):
    u, v = ablations.spectral_global_scale(W, rank, activation=activation)
    least = relative_risk((u, v), activation=activation)
    for factor in np.linspace(0, 3, 61):
        assert least <= relative_risk((factor * u, v), activation=activation) + 1e-5
    a, b = projection.spectral(W, rank)
    np.testing.assert_allclose((u @ v) / (a @ b), (u @ v)[0, 0] / (a @ b)[0, 0], rtol=1e-3)


def test_a_global_scale_has_a_closed_form_for_relu():
    a, b = projection.spectral(W, 3)
    y = a @ b
    lengths = jnp.linalg.norm(W, axis=0), jnp.linalg.norm(y, axis=0)
    rho = lengths[1] / lengths[0]
    h = (jnp.sqrt(1 - rho**2) + (jnp.pi - jnp.arccos(rho)) * rho) / jnp.pi
    u, v = ablations.spectral_global_scale(W, 3)
    np.testing.assert_allclose(u @ v, y * jnp.sum(lengths[0] * lengths[1] * h) / jnp.sum(lengths[1] ** 2), atol=1e-3)


@pytest.mark.parametrize("group", [1, 3])
def test_column_scales_make_the_spectral_product_that_of_the_projection(group):
    u, v = ablations.spectral_column_scales(W, 4, group=group)
    a, b = projection.kernel_projection(W, 4, group=group)
    np.testing.assert_allclose(u @ v, a @ b, atol=5e-5)
    np.testing.assert_array_equal(u, projection.spectral(W, 4)[0])


def test_a_random_subspace_has_the_best_lengths_and_nothing_else():
    u, v = ablations.random_subspace(KEY, W, 4)
    y = u @ v
    q = jnp.linalg.qr(u)[0]
    rho = jnp.linalg.norm(q.T @ W, axis=0) / jnp.linalg.norm(W, axis=0)
    whole = 0.5 * jnp.sum(W**2, axis=0)
    h = (jnp.sqrt(1 - rho**2) + (jnp.pi - jnp.arccos(rho)) * rho) / jnp.pi
    np.testing.assert_allclose(projection.risk(W, y), jnp.sum(whole * (1 - h**2)), rtol=1e-5)
    # A random subspace keeps r / n of a column's square, give or take its deviation over 24 columns and 50 draws.
    kept = [
        jnp.mean(jnp.sum((jnp.linalg.qr(ablations.random_subspace(k, W, 4)[0])[0].T @ W) ** 2, 0) / jnp.sum(W**2, 0))
        for k in jax.random.split(KEY, 50)
    ]
    np.testing.assert_allclose(np.mean(kept), 4 / 14, atol=0.03)


def test_unit_spectral_has_singular_values_of_one():
    u, v = ablations.unit_spectral(W, 5)
    np.testing.assert_allclose(jnp.linalg.svd(u @ v)[1][:5], 1, atol=1e-5)
    left, _, right = np.linalg.svd(W)
    np.testing.assert_allclose(jnp.linalg.svd(left[:, :5].T @ u)[1], 1, atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.svd(right[:5] @ v.T)[1], 1, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 8])
def test_random_factors_keep_the_variance_of_the_product(rank):
    w = 0.3 * jax.random.normal(KEY, (400, 500))
    products = [u @ v for u, v in (ablations.random_factors(jax.random.key(k), w, rank) for k in range(8))]
    # A product of r terms has heavy tails: its mean square varies by about sqrt(2 / (n r)) + sqrt(2 / (m r)) a draw.
    np.testing.assert_allclose(np.mean(np.square(products)), 0.09, rtol=0.1)


@pytest.mark.parametrize("method", ["spectral_global_scale", "spectral_column_scales", "random_subspace", "random", "spectral"])
@pytest.mark.parametrize("size", [1e25, 1e-20])
def test_the_size_of_a_kernel_does_not_matter(method, size):
    u, v = methods.factor(method, KEY, W, 3)
    a, b = methods.factor(method, KEY, size * W, 3)
    # The global scale is found by comparing values, which tell a minimum to half of their digits.
    np.testing.assert_allclose((a / np.sqrt(size)) @ (b / np.sqrt(size)), u @ v, atol=5e-3)
    np.testing.assert_allclose(projection.relative_risk(size * W, a @ b), projection.relative_risk(W, u @ v), rtol=1e-3)
