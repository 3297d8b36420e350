"""Dual activations against golden values, sampling and quadrature in the plane."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import activations


@pytest.mark.parametrize(
    ("rho", "h"), [(0, 1 / np.pi), (0.25, 0.453310), (0.5, 0.608998), (0.75, 0.788002), (0.9, 0.909538), (1, 1), (-1, 0)]
)
def test_golden_values_of_h(rho, h):
    np.testing.assert_allclose(activations.relu_h(jnp.float32(rho)), h, atol=1e-6)


@pytest.mark.parametrize("rho", [-1.0, -0.5, 0.0, 0.7, 1.0])
def test_the_slope_of_h_is_finite_even_at_the_ends(rho):
    slope = jax.grad(activations.relu_h)(rho)
    np.testing.assert_allclose(slope, (np.pi - np.arccos(rho)) / np.pi, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("relu", (0.370, 0.483, 0.678)),
        ("silu", (0.161, 0.396, 0.663)),
        ("gelu", (0.266, 0.450, 0.676)),
        ("tanh", (0.061, 0.188, 0.418)),
        ("identity", (0.1, 0.3, 0.6)),
    ],
)
def test_golden_best_lengths(name, best):
    rho = jnp.array([0.1, 0.3, 0.6])
    np.testing.assert_allclose(activations.get(name).best_length(jnp.ones(3), rho), best, atol=6e-4)


@functools.cache
def compiled(name):
    activation = activations.get(name)
    return jax.jit(activation.risk), jax.jit(activation.best_length)


def planar_risk(fn, s, t, rho):
    """E (fn(s x) - fn(t y))² over a correlated pair by an even grid in the plane, in float64."""
    grid = np.linspace(-9, 9, 1001)
    weight = np.exp(-(grid**2) / 2)
    weight /= weight.sum()
    x, z = grid[:, None], grid[None]
    with jax.enable_x64(True):
        gap = np.asarray(fn(s * x)) - np.asarray(fn(t * (rho * x + np.sqrt(1 - rho**2) * z)))
    return float(weight @ gap**2 @ weight)


NAMES = [name for name in activations.ACTIVATIONS if name != "swish"]  # another name for silu

# The first figure is the tolerance up to length 3, the second at length 10, where a sigmoid is nearly a jump; both relative.
TOLERANCE = {"tanh": (2e-4, 4e-3), "sigmoid": (1e-4, 1e-3), "hard_swish": (1e-4, 3e-4)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("s", "t"), [(0.1, 0.05), (1.0, 0.3), (3.0, 3.0), (10.0, 4.0)])
def test_risk_is_that_of_quadrature_in_the_plane(name, s, t):
    activation = activations.get(name)
    whole = planar_risk(activation.fn, s, 0.0, 0.0)
    for rho in (-0.7, 0.0, 0.4, 0.95):
        risk = compiled(name)[0](jnp.float32(s), jnp.float32(t), jnp.float32(rho))
        tolerance = TOLERANCE.get(name, (5e-5, 1e-4))[s > 3]
        np.testing.assert_allclose(risk, planar_risk(activation.fn, s, t, rho), atol=tolerance * whole)


@pytest.mark.parametrize("fn", [nn.relu, functools.partial(nn.leaky_relu, negative_slope=0.2), jnp.abs])
def test_a_kink_costs_the_series_little(fn):
    activation = activations.get(fn)
    for rho in (-0.9, 0.1, 0.5, 0.99):
        risk = activation.risk(jnp.float32(1), jnp.float32(0.7), jnp.float32(rho))
        np.testing.assert_allclose(risk, planar_risk(fn, 1.0, 0.7, rho), atol=1e-3 * planar_risk(fn, 1.0, 0.0, 0.0))


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0])
def test_leaky_relu_is_exact_for_every_slope(slope):
    activation = activations.leaky_relu(slope)
    for rho in (-0.8, 0.0, 0.6):
        risk = activation.risk(jnp.float32(1.5), jnp.float32(0.4), jnp.float32(rho))
        np.testing.assert_allclose(risk, planar_risk(activation.fn, 1.5, 0.4, rho), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_other_length_does_better(name):
    risk, best_length = compiled(name)
    s, rho = jnp.repeat(jnp.array([0.2, 1.0, 4.0]), 4), jnp.tile(jnp.array([0.0, 0.3, 0.8, 1.0]), 3)
    best = best_length(s, rho)
    least, whole = risk(s, best, rho), risk(s, 0 * s, rho)
    for t in np.linspace(0, 2, 41):
        assert (least <= risk(s, t * s, rho) + 2e-6 * whole).all()
    np.testing.assert_allclose(best[rho == 1], s[rho == 1], rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_between_equal_columns_and_nothing_kept_of_a_zero_one(name):
    risk, best_length = compiled(name)
    s = jnp.array([0.0, 0.3, 2.0])
    np.testing.assert_allclose(risk(s, s, jnp.ones(3)), 0, atol=1e-6)
    assert best_length(jnp.zeros(()), jnp.zeros(())) == 0


@pytest.mark.parametrize("name", ["leaky_relu", "silu", "tanh"])
def test_the_derivative_of_the_best_length_is_that_of_differences(name):
    with jax.enable_x64(True):
        best = activations.get(name).best_length
        slope = jax.grad(lambda rho: best(jnp.float64(1.3), rho))(jnp.float64(0.4))
        up, down = (best(jnp.float64(1.3), jnp.float64(0.4 + step)) for step in (1e-5, -1e-5))
        np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-4)


def test_the_search_takes_the_deepest_of_several_valleys():
    high = jnp.array([10.0, 10.0])
    found = activations.minimise(lambda t: jnp.cos(3 * t) + 0.1 * (t - jnp.array([5.2, 1.1])) ** 2, high)
    grid = jnp.linspace(0, 10, 200_001)
    for j, centre in enumerate((5.2, 1.1)):
        values = jnp.cos(3 * grid) + 0.1 * (grid - centre) ** 2
        np.testing.assert_allclose(found[j], grid[jnp.argmin(values)], atol=2e-3)


def test_unknown_activations_are_named():
    with pytest.raises(ValueError, match="unknown activation 'rleu'; did you mean relu"):
        activations.get("rleu")
    with pytest.raises(ValueError, match="is not an elementwise function, finite at every number"):
        activations.get(jnp.log)
    with pytest.raises(ValueError, match="is not an elementwise function"):
        activations.get(jnp.sum)
    with pytest.raises(ValueError, match="cannot be traced by jax"):
        activations.get(np.sin)
    with pytest.raises(ValueError, match="3 is neither a name nor a function"):
        activations.get(3)
