"""Dual activations against golden values, sampling and quadrature in the plane."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import activations
from tests.projection.reference import FUNCTIONS, planar_risk


def test_golden_values_of_h():
    golden = {0: 1 / np.pi, 0.25: 0.453310, 0.5: 0.608998, 0.75: 0.788002, 0.9: 0.909538, 1: 1, -1: 0}
    np.testing.assert_allclose(activations.relu_h(np.float32([*golden])), [*golden.values()], atol=1e-6)


def test_the_slope_of_h_is_finite_even_at_the_ends():
    rho = np.float32([-1.0, -0.5, 0.0, 0.7, 1.0])
    slope = jax.jit(jax.vmap(jax.grad(activations.relu_h)))(rho)
    np.testing.assert_allclose(slope, (np.pi - np.arccos(rho)) / np.pi, atol=1e-6)


SLOW = ("gelu_tanh", "sigmoid", "softplus", "elu")  # their risks are among those that sampling gives in test_matrix
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in activations.ACTIVATIONS
    if name != "swish"  # another name for silu
]


@functools.cache
def compiled(name):
    """Its risk and best length, compiled for one shape that all tests share."""
    activation = activations.get(name)
    risk, best_length = jax.jit(activation.risk), jax.jit(activation.best_length)

    def risks(s, t, rho):
        arrays = np.broadcast_arrays(s, t, rho)
        flat = [np.resize(array.astype(np.float32), 512) for array in arrays]
        return np.asarray(risk(*flat))[: arrays[0].size].reshape(arrays[0].shape)

    def best_lengths(s, rho):
        flat = [np.resize(np.float32(array), 16) for array in (s, rho)]
        return np.asarray(best_length(*flat))[: len(s)]

    return risks, best_lengths


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
    np.testing.assert_allclose(compiled(name)[1](np.ones(3), [0.1, 0.3, 0.6]), best, atol=6e-4)


# The first figure is the tolerance up to length 3, the second at length 10, where a sigmoid is nearly a jump; both relative.
TOLERANCE = {
    "tanh": (2e-4, 4e-3),
    "sigmoid": (1e-4, 1e-3),
    "hard_swish": (1e-4, 3e-4),
    "relu6": (3e-4, 5e-4),
    "hard_tanh": (4e-4, 1e-3),
    "softsign": (2e-4, 7e-4),
}
PAIRS = [(0.1, 0.05), (1.0, 0.3), (3.0, 3.0), (10.0, 4.0)]


@pytest.mark.parametrize("name", NAMES)
def test_risk_is_that_of_quadrature_in_the_plane(name):
    fn, cosines = FUNCTIONS[name], [-0.7, 0.0, 0.4, 0.95]
    s, t = np.transpose(PAIRS)
    risks = compiled(name)[0](s[:, None], t[:, None], np.array(cosines))
    for (s, t), of_pair in zip(PAIRS, risks, strict=True):
        tolerance = TOLERANCE.get(name, (5e-5, 1e-4))[s > 3] * planar_risk(fn, s, 0.0, 0.0)
        np.testing.assert_allclose(of_pair, [planar_risk(fn, s, t, rho) for rho in cosines], atol=tolerance)


@pytest.mark.parametrize(
    ("fn", "reference"),
    [
        (nn.relu, FUNCTIONS["relu"]),
        (functools.partial(nn.leaky_relu, negative_slope=0.2), lambda x: np.where(x > 0, x, 0.2 * x)),
        (jnp.abs, np.abs),
    ],
)
def test_a_kink_costs_the_series_little(fn, reference):
    activation, cosines = activations.get(fn), [-0.9, 0.1, 0.5, 0.99]
    risks = jax.jit(activation.risk)(np.float32(1), np.float32(0.7), np.float32(cosines))
    wanted = [planar_risk(reference, 1.0, 0.7, rho) for rho in cosines]
    np.testing.assert_allclose(risks, wanted, atol=1e-3 * planar_risk(reference, 1.0, 0.0, 0.0))


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0])
def test_leaky_relu_is_exact_for_every_slope(slope):
    cosines = [-0.8, 0.0, 0.6]
    risks = jax.jit(activations.leaky_relu(slope).risk)(np.float32(1.5), np.float32(0.4), np.float32(cosines))
    wanted = [planar_risk(lambda x: np.where(x > 0, x, slope * x), 1.5, 0.4, rho) for rho in cosines]
    np.testing.assert_allclose(risks, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_other_length_does_better(name):
    risk, best_length = compiled(name)
    s, rho = np.repeat([0.2, 1.0, 4.0], 4), np.tile([0.0, 0.3, 0.8, 1.0], 3)
    best = best_length(s, rho)
    least, whole = risk(s, best, rho), risk(s, 0 * s, rho)
    others = risk(s, np.linspace(0, 2, 41)[:, None] * s, rho)
    assert (least <= others + 2e-6 * whole).all()
    np.testing.assert_allclose(best[rho == 1], s[rho == 1], rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_between_equal_columns_and_nothing_kept_of_a_zero_one(name):
    risk, best_length = compiled(name)
    s = np.array([0.0, 0.3, 2.0])
    np.testing.assert_allclose(risk(s, s, np.ones(3)), 0, atol=1e-6)
    assert best_length(np.zeros(1), np.zeros(1)) == 0


@pytest.mark.parametrize("name", ["leaky_relu", "silu", "tanh"])
def test_the_derivative_of_the_best_length_is_that_of_differences(name):
    with jax.enable_x64(True):
        best = activations.get(name).best_length
        both = jax.jit(jax.vmap(jax.value_and_grad(lambda rho: best(jnp.float64(1.3), rho))))
        (up, _, down), (_, slope, _) = both(np.array([0.4 + 1e-5, 0.4, 0.4 - 1e-5]))
        np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-4)


def test_the_search_takes_the_deepest_of_several_valleys():
    centres = np.float32([5.2, 1.1])
    high = np.float32([10.0, 10.0])
    found = jax.jit(lambda high: activations.minimise(lambda t: jnp.cos(3 * t) + 0.1 * (t - centres) ** 2, high))(high)
    grid = np.linspace(0, 10, 200_001)
    for j, centre in enumerate(centres):
        values = np.cos(3 * grid) + 0.1 * (grid - centre) ** 2
        np.testing.assert_allclose(found[j], grid[np.argmin(values)], atol=2e-3)


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


@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu"])
def test_closed_forms_are_those_of_their_function(name):
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    np.testing.assert_allclose(activations.get(name).fn(x), FUNCTIONS[name](x), rtol=1e-6)
    np.testing.assert_allclose(activations.leaky_relu(0.3).fn(x), np.where(x > 0, x, 0.3 * x), rtol=1e-6)
    assert activations.get("swish") is activations.get("silu")
