"""Hermite moments against the tensors that define them, their closed forms against samples; the test for Gaussian inputs."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.theory import moments
from lowrank_jax.theory.moments import NotGaussianWarning, Overview
from lowrank_jax.theory.samples import SampleError, from_arrays

N, WIDTH, OUTPUTS, DIRECTIONS = 6, 4, 3, 2


def unit_columns(rng, *shape):
    drawn = rng.standard_normal(shape)
    return drawn / np.linalg.norm(drawn, axis=0)


@pytest.fixture(scope="module")
def network():
    """W with columns of length one, A, directions u `[l, n]`, x and y."""
    rng = np.random.default_rng(0)
    w, a, u = unit_columns(rng, N, WIDTH), rng.standard_normal((WIDTH, OUTPUTS)), unit_columns(rng, N, DIRECTIONS).T
    u[0] = w[:, 0]  # at a random angle to all columns there is little to see
    x = rng.standard_normal((400_000, N))
    return w, a, u, x, np.maximum(x @ w, 0) @ a


def over_parts(moments_of, x, y, parts=40):
    """The mean of moments of parts of the samples, and its standard error."""
    found = np.stack([moments_of(from_arrays(*part)) for part in zip(np.split(x, parts), np.split(y, parts), strict=True)])
    return found.mean(axis=0), found.std(axis=0, ddof=1) / math.sqrt(parts)


def test_second_moments_are_those_of_the_hermite_polynomial(network):
    *_, x, y = network
    x, y = x[:300], y[:300]
    found, fourth = moments.second_moments(from_arrays(x, y))
    he = x[:, :, None] * x[:, None, :] - np.eye(N)
    np.testing.assert_allclose(found, np.einsum("sk,sij->kij", y, he) / len(x), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(fourth, np.mean(np.sum(x**2, axis=1) ** 2), rtol=1e-12)


def test_fourth_moments_are_those_of_the_hermite_tensor_contracted(network):
    _, _, u, x, y = network
    x, y, eye = x[:300], y[:300], np.eye(N)
    products = np.einsum("si,sj->sij", x, x)
    tensor = np.einsum("sij,skl->sijkl", products, products)
    for pairs in ("ij kl", "ik jl", "il jk", "kl ij", "jl ik", "jk il"):
        left, right = pairs.split()
        tensor -= np.einsum(f"{left},s{right}->sijkl", eye, products)
    for left, right in (("ij", "kl"), ("ik", "jl"), ("il", "jk")):
        tensor += np.einsum(f"{left},{right}->ijkl", eye, eye)
    wanted = np.einsum("so,sijkl,ak,al->aoij", y, tensor, u, u).reshape(-1, N, N) / len(x)
    np.testing.assert_allclose(moments.fourth_moments(from_arrays(x, y), jnp.asarray(u)), wanted, rtol=1e-9, atol=1e-11)


def test_closed_forms_are_what_sampling_gives(network):
    w, a, u, x, y = network
    mean, error = over_parts(lambda samples: moments.second_moments(samples)[0], x, y)
    assert (abs(mean - moments.second_moments_of(w, a)) < 5 * error).all()
    mean, error = over_parts(lambda samples: moments.fourth_moments(samples, jnp.asarray(u)), x, y)
    wanted = np.asarray(moments.fourth_moments_of(w, a, u))
    assert (abs(mean - wanted) < 5 * error).all()
    assert abs(wanted).max() > 10 * error.max()  # or zeros would do


def test_closed_forms_hold_within_a_subspace(network):
    w, a, _, x, y = network
    rng = np.random.default_rng(1)
    basis, u = np.linalg.qr(rng.standard_normal((N, 2)))[0], unit_columns(rng, 2, DIRECTIONS).T
    assert (np.linalg.norm(basis.T @ w, axis=0) < 0.95).any()
    mean, error = over_parts(
        lambda samples: moments.fourth_moments(samples.through(jnp.asarray(basis), jnp.eye(OUTPUTS)), jnp.asarray(u)), x, y
    )
    assert (abs(mean - moments.fourth_moments_of(basis.T @ w, a, u)) < 5 * error).all()


def test_a_look_tells_what_numpy_does(network):
    *_, x, y = network
    x, y = x[:100], y[:100]
    seen = moments.look(from_arrays(x, y))
    assert seen.count == 100
    np.testing.assert_allclose(seen.covariance, x.T @ x / 100, atol=1e-12)
    np.testing.assert_allclose(seen.outputs, y.T @ y / 100, atol=1e-12)
    np.testing.assert_allclose(seen.mean_output, y.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(seen.powers, [(x**power).mean(axis=0) for power in (1, 2, 3, 4)], atol=1e-12)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_refused(network, wrong, which):
    parts = [part[:100].copy() for part in network[3:]]
    parts[which][3, 1] = wrong
    with pytest.raises(SampleError, match="the samples contain non-finite values"):
        moments.look(from_arrays(*parts))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_inputs_whose_fourth_powers_leave_their_dtype_are_refused(network, scale):
    x, y = (part[:100] for part in network[3:])
    with pytest.raises(SampleError, match="the inputs' fourth powers are beyond the range of float32: scale x"):
        moments.look(from_arrays((scale * x).astype(np.float32), y.astype(np.float32)))
    moments.look(from_arrays(scale * x, y))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e-15, "squared errors of the outputs are beyond the range of float32: scale y"),
        (1e-30, "squared errors of the outputs are beyond the range of float32: scale y"),
        (1e25, "or values whose squares overflow"),
    ],
)
def test_outputs_of_which_errors_could_not_be_told_are_refused(network, scale, message):
    x, y = (part[:100] for part in network[3:])
    with pytest.raises(SampleError, match=message):
        moments.look(from_arrays(x.astype(np.float32), (scale * y).astype(np.float32)))
    moments.look(from_arrays(x, scale * y))


# --- are they Gaussian? ---


def seen(x):
    """What a look at the inputs tells, and E |z|⁴ of the whitened ones; by numpy."""
    covariance = x.T @ x / len(x)
    z = np.linalg.solve(np.linalg.cholesky(covariance), x.T)
    powers = np.stack([(x**power).mean(axis=0) for power in (1, 2, 3, 4)])
    return Overview(len(x), covariance, np.eye(1), np.zeros(1), powers), float(np.mean(np.sum(z**2, axis=0) ** 2))


def mixing(n):
    return np.random.default_rng(99).standard_normal((n, n)) + np.eye(n)


@pytest.mark.parametrize("count", [200, 1000, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_gaussian_inputs_of_any_covariance_raise_no_alarm(n, count):
    for seed in range(30):
        x = np.random.default_rng(seed).standard_normal((count, n))
        assert moments.not_gaussian(*seen(x)) is None
        assert moments.not_gaussian(*seen(x @ mixing(n))) is None


def uniform(rng):
    return rng.uniform(-1, 1, (5000, 5))


def two_scales(rng):
    """Every input but the first is Gaussian, and no two are correlated: they are large together."""
    x = rng.standard_normal((20_000, 5))
    x[:, 1:] *= np.where(abs(x[:, :1]) > 0.6745, 1.2, 0.75)
    return x


def heavy(rng):
    x = rng.standard_normal((5000, 5))
    x[:, 3] = rng.laplace(size=5000)
    return x


def skewed(rng):
    x = rng.standard_normal((5000, 5))
    x[:, 2] = rng.gamma(50, size=5000) - 50
    return x


def shifted_little(rng):
    """By 0.7 of their standard deviation along one direction, which is a hundredth of the others'."""
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    return rng.normal([0, 0, 0, 0, 0.007], [1, 1, 1, 1, 0.01], (5000, 5)) @ turn


OTHERS = {
    "uniform": (uniform, r"^input \d has a kurtosis of 1\.[78]\d*, not 3|E \|z\|\^4"),
    "uniform, correlated": (lambda rng: uniform(rng) @ mixing(5), r"^input \d has a kurtosis of 2\.\d|E \|z\|\^4 = (28|29)"),
    "Student's": (lambda rng: rng.standard_t(8, (5000, 5)), r"has a kurtosis of [3-9]|E \|z\|\^4"),
    "shifted": (lambda rng: rng.normal([0, 0, 0, 0, 0.2], 1, (5000, 5)), r"^the inputs' mean is 0\.[12]\d* standard"),
    "shifted where they vary least": (shifted_little, r"^the inputs' mean is 0\.[56]\d* standard deviations from zero"),
    "with a constant": (lambda rng: np.insert(rng.standard_normal((5000, 5)), 2, 1, axis=1), "^input 2 is constant"),
    "one heavy tail": (heavy, r"^input 3 has a kurtosis of [4-9]"),
    "one skewed": (skewed, r"^input 2 has a skewness of 0\.[23]"),
    "large together": (two_scales, r"whitened inputs have E \|z\|\^4 = \d+\.\d+, not 3[45]"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_told_from_gaussians(name):
    draw, words = OTHERS[name]
    for seed in range(5):
        found = moments.not_gaussian(*seen(draw(np.random.default_rng(seed))))
        assert found is not None
        assert re.search(words, found), found


def test_the_warning_names_the_worst():
    with pytest.warns(NotGaussianWarning, match="input 3 has a kurtosis of .*: the guarantees do not cover such inputs"):
        moments.warn_if_not_gaussian(*seen(heavy(np.random.default_rng(0))))


def covariances(scale, count, seeds):
    for seed in range(seeds):
        x = np.random.default_rng(seed).standard_normal((count, 6)) * scale
        yield x.T @ x / count


@pytest.mark.parametrize("count", [100, 1000, 30_000])
def test_samples_of_the_identity_agree_with_it(count):
    assert all(moments.agrees_with_identity(covariance, count) for covariance in covariances(1, count, 100))


def test_five_per_cent_of_variance_are_noticed():
    assert not any(moments.agrees_with_identity(covariance, 30_000) for covariance in covariances(math.sqrt(1.05), 30_000, 30))
