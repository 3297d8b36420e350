import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import activations


@pytest.mark.parametrize(
    ("rho", "h"), [(0, 1 / np.pi), (0.25, 0.453310), (0.5, 0.608998), (0.75, 0.788002), (0.9, 0.909538), (1, 1), (-1, 0)]
)
def test_golden_values_of_h(rho, h):
    np.testing.assert_allclose(activations.relu_h(jnp.float32(rho)), h, atol=1e-6)


def test_h_is_what_sampling_gives():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 1_000_000))
    rho = 0.3
    x, y = z[0], rho * z[0] + np.sqrt(1 - rho**2) * z[1]
    products = np.maximum(x, 0) * np.maximum(y, 0) / 0.5
    error = products.std() / 1000
    assert abs(products.mean() - float(activations.relu_h(jnp.float32(rho)))) < 4 * error


@pytest.mark.parametrize("rho", [-1.0, -0.5, 0.0, 0.7, 1.0])
def test_the_slope_of_h_is_finite_even_at_the_ends(rho):
    slope = jax.grad(activations.relu_h)(rho)
    np.testing.assert_allclose(slope, (np.pi - np.arccos(rho)) / np.pi, atol=1e-6)


def test_unknown_activations_are_named():
    with pytest.raises(ValueError, match="unknown activation 'rleu'; did you mean relu"):
        activations.get("rleu")
