"""The parts of the search, each on what it promises; what they make together is learning's test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.theory import draw_network, draw_samples, moments, search
from lowrank_jax.theory.gauss_newton import Fit
from lowrank_jax.theory.learning import silent
from lowrank_jax.theory.samples import from_arrays

N, WIDTH = 10, 5


@pytest.fixture(scope="module")
def drawn():
    """A network, and samples of correlated inputs."""
    network = draw_network(jax.random.key(0), N, WIDTH, 5)
    z, _ = draw_samples(jax.random.key(1), network, 20_000)
    x = z @ (jnp.eye(N) + 0.3 * jax.random.normal(jax.random.key(2), (N, N)))
    return network, from_arrays(x, network(x))


def test_whitened_samples_have_the_identity_for_second_moments(drawn):
    _, samples = drawn
    root, white = search._whitened(samples, moments.look(samples), WIDTH)
    seen = moments.look(white)
    np.testing.assert_allclose(seen.covariance, np.eye(N), atol=1e-10)
    np.testing.assert_allclose(seen.outputs, np.eye(5), atol=1e-10)
    x, _, _ = next(white.read())
    np.testing.assert_allclose(x, next(samples.read())[0] @ root, atol=1e-12)


def test_outputs_that_follow_from_others_are_dropped(drawn):
    _, samples = drawn
    double = samples.map(jax.jit(lambda x, y: (x, jnp.concatenate([y, y @ jnp.ones((5, 2))], axis=1))))
    assert double.outputs == 7
    _, white = search._whitened(double, moments.look(double), WIDTH)
    assert white.outputs == 5


def test_what_a_network_explains_has_no_sampling_error(drawn):
    network, samples = drawn
    root, white = search._whitened(samples, moments.look(samples), WIDTH)
    w = jnp.linalg.inv(root) @ network.w
    w /= jnp.linalg.norm(w, axis=0)
    truth = Fit(w, search.outputs_fitted(white, w), 0.0, *[jnp.zeros(())] * 3)
    exact = moments.second_moments_of(truth.w, truth.a)
    sampled, _, _ = search._slices(white, WIDTH, None, jax.random.key(0))
    known, basis, _ = search._slices(white, WIDTH, truth, jax.random.key(0))
    np.testing.assert_allclose(basis @ known @ basis.T, exact, atol=1e-10)
    assert np.linalg.norm(basis @ known @ basis.T - exact) < 1e-6 * np.linalg.norm(sampled)


def test_with_one_output_fourth_moments_tell_directions_apart(drawn):
    network, samples = drawn
    one = samples.map(jax.jit(lambda x, y: (x, y[:, :1])))
    root, white = search._whitened(one, moments.look(one), WIDTH)
    w = jnp.linalg.inv(root) @ network.w
    w /= jnp.linalg.norm(w, axis=0)
    truth = Fit(w, search.outputs_fitted(white, w), 0.0, *[jnp.zeros(())] * 3)
    slices, basis, _ = search._slices(white, WIDTH, truth, jax.random.key(0))
    assert len(slices) == 1 + 2 * WIDTH
    found = basis @ search.common_directions(slices, WIDTH, jax.random.key(1))
    np.testing.assert_allclose(np.max(abs(w.T @ found), axis=1), 1, atol=1e-4)  # as far as so many sweeps go


def test_a_regression_tells_signs(drawn):
    network, samples = drawn
    flips = np.array([1, -1, -1, 1, -1])
    w = network.w / jnp.linalg.norm(network.w, axis=0)
    sums = samples.mean(search._regress_both, w * flips)
    np.testing.assert_allclose(search._signed(w * flips, *sums), w, atol=1e-12)


def test_outputs_are_fitted_by_least_squares(drawn):
    network, samples = drawn
    x, y, rows = next(samples.head(1000).read())
    wrong = network.w + 0.1 * jax.random.normal(jax.random.key(3), network.w.shape)
    hidden = np.maximum(x[:rows] @ wrong, 0)
    found = search.outputs_fitted(from_arrays(x[:rows], y[:rows]), wrong)
    np.testing.assert_allclose(found, np.linalg.lstsq(hidden, y[:rows], rcond=None)[0], rtol=1e-9, atol=1e-11)


def test_an_attempt_that_goes_astray_is_followed_by_another(drawn, monkeypatch):
    network, samples = drawn
    good, calls = search.common_directions, []

    def astray(slices, width, key):
        calls.append(key)
        return good(slices, width, key) if len(calls) > 1 else jnp.eye(len(slices[0]))[:, :width]

    monkeypatch.setattr(search, "common_directions", astray)
    monkeypatch.setattr(search, "polish", short_of_local(search.polish, calls))
    lines = []
    w = search.search(samples, moments.look(samples), WIDTH, jax.random.key(0), lines.append)
    cosines = abs(w.T @ network.w) / jnp.linalg.norm(w, axis=0)[:, None] / jnp.linalg.norm(network.w, axis=0)
    np.testing.assert_allclose(cosines.max(axis=1), 1, atol=1e-9)
    assert len(lines) == len(calls) == 2
    assert lines[0].startswith("attempt 1 of at most 10: ")


def short_of_local(polish, calls):
    """Gauss–Newton often mends a bad start: the first is left as it is."""

    def polished(samples, count, w, goal):
        return polish(samples, count, w, goal=goal if len(calls) > 1 else np.inf)

    return polished


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_outputs_of_very_different_sizes_are_learned_alike(drawn, scale):
    network, samples = drawn
    uneven = samples.map(jax.jit(lambda x, y: (x, y * jnp.array([scale, 1, 1, 1, 1]))))
    w = search.search(uneven, moments.look(uneven), WIDTH, jax.random.key(0), silent)
    cosines = abs(w.T @ network.w) / jnp.linalg.norm(w, axis=0)[:, None] / jnp.linalg.norm(network.w, axis=0)
    np.testing.assert_allclose(cosines.max(axis=1), 1, atol=1e-9)
