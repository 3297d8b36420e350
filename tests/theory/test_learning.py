"""Networks are learned from samples, to rounding; what cannot be learned is refused with the reason."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.experiment.hosts.sharding import make_mesh
from lowrank_jax.theory import (
    NotGaussianWarning,
    SampleError,
    draw_network,
    draw_samples,
    learn_from_batches,
    learn_relu_network,
    start_from_moments,
)

N, WIDTH, OUTPUTS, COUNT = 10, 5, 5, 20_000
KEY = jax.random.key(7)
slow = pytest.mark.slow


def draw(seed, n=N, width=WIDTH, outputs=OUTPUTS, count=COUNT):
    network = draw_network(jax.random.key(seed), n, width, outputs)
    return (network, *map(np.asarray, draw_samples(jax.random.key(seed + 100), network, count)))


@pytest.fixture(scope="module")
def drawn():
    return draw(0)


@pytest.fixture(scope="module")
def learned(drawn):
    _, x, y = drawn
    return learn_relu_network(x, y, WIDTH, key=KEY)


def function_error(network, truth, x):
    """The mean squared difference of the outputs over their variance."""
    wanted = np.asarray(truth(x))
    return np.sum((network(x) - wanted) ** 2) / np.sum((wanted - wanted.mean(axis=0)) ** 2)


def fresh(n, count=5000, seed=1000):
    return np.random.default_rng(seed).standard_normal((count, n))


def assert_learned(network, truth, x, error=1e-20):
    assert network.converged
    assert function_error(network, truth, x) < error
    np.testing.assert_allclose(jnp.linalg.norm(network.a, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("n", "width", "outputs", "count"),
    [
        (10, 5, 5, 20_000),
        pytest.param(20, 10, 1, 120_000, marks=slow),
        pytest.param(20, 10, 10, 50_000, marks=slow),
        pytest.param(8, 8, 12, 30_000, marks=slow),
    ],
    ids=["small", "one output", "larger", "square, with more outputs than width"],
)
def test_networks_are_learned_to_rounding(n, width, outputs, count):
    truth, x, y = draw(0, n, width, outputs, count)
    network = learn_relu_network(x, y, width, key=KEY)
    assert_learned(network, truth, fresh(n))
    assert network.w.shape == (n, width)
    assert network.a.shape == (width, outputs)
    assert network.w.dtype == network.a.dtype == np.float64
    assert network.residual < 1e-20
    # Rows of A of length one on both sides: up to order, W is the same.
    order = np.argmax(abs(truth.w.T @ network.w) / np.linalg.norm(network.w, axis=0), axis=1)
    np.testing.assert_allclose(network.w[:, order], truth.w, atol=1e-9)


@pytest.mark.slow
def test_opposite_columns_of_which_moments_see_one_are_learned_all_the_same(drawn):
    _, x, _ = drawn
    w = np.random.default_rng(0).standard_normal((N, 2))
    w[:, 1] = -w[:, 0]
    for row in (0.5, -1.0):  # the second is linear in x: its second moments are zero

        def truth(x, row=row):
            return np.maximum(x @ w, 0) @ [[1.0], [row]]

        assert_learned(learn_relu_network(x, truth(x), 2, key=KEY), truth, fresh(N))


def test_the_residual_is_the_error_over_the_outputs_variance(drawn):
    _, x, y = drawn
    network = start_from_moments(x, y, WIDTH, key=KEY)
    hidden = np.maximum(x @ np.asarray(network.w), 0)
    wanted = np.sum((y - hidden @ np.asarray(network.a)) ** 2) / np.sum((y - y.mean(axis=0)) ** 2)
    np.testing.assert_allclose(network.residual, wanted, rtol=1e-10)
    assert not network.converged
    np.testing.assert_allclose(network(x[:7]), hidden[:7] @ network.a, rtol=1e-10)
    np.testing.assert_allclose(network(x[:6].reshape(2, 3, N)).reshape(6, -1), network(x[:6]), rtol=1e-12)


def test_correlated_gaussian_inputs_are_covered_without_a_warning(drawn):
    truth, z, _ = drawn
    x = z @ (np.eye(N) + 0.5 * np.random.default_rng(0).standard_normal((N, N)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = learn_relu_network(x, np.asarray(truth(x)), WIDTH, key=KEY)
    assert_learned(network, truth, x)


def test_float32_is_learned_in_float32(drawn):
    truth, x, y = drawn
    network = learn_relu_network(np.float32(x), np.float32(y), WIDTH, key=KEY)
    assert network.w.dtype == network.a.dtype == np.float32
    assert network.residual < 1e-10
    assert_learned(network, truth, fresh(N), 1e-10)


@slow
def test_devices_that_share_the_samples_learn_the_same(drawn, learned):
    truth, x, y = drawn
    network = learn_relu_network(x, y, WIDTH, key=KEY, mesh=make_mesh())
    assert_learned(network, truth, fresh(N))
    np.testing.assert_allclose(network(fresh(N)), learned(fresh(N)), atol=1e-10)


def test_the_same_key_gives_the_same_network(drawn, learned):
    _, x, y = drawn
    again, other = (learn_relu_network(x, y, WIDTH, key=key) for key in (KEY, jax.random.key(8)))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(learned), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(other.w != learned.w)
    assert_learned(other, learned, fresh(N))


def test_batches_teach_what_arrays_do(drawn, learned):
    _, x, y = drawn
    sizes = [1, 7000, 30, 12_969]
    ends = np.cumsum(sizes)[:-1]
    network = learn_from_batches([*zip(np.split(x, ends), np.split(y, ends), strict=True)], WIDTH, key=KEY)
    assert network.converged
    np.testing.assert_allclose(network(fresh(N)), learned(fresh(N)), atol=1e-10)


def test_progress_is_told(drawn):
    _, x, y = drawn
    lines = []
    learn_relu_network(x, y, WIDTH, key=KEY, say=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("attempt 1 of at most 10: ")
    assert lines[0].endswith("of the outputs' power is unexplained")


def test_noise_is_left_over_and_nothing_has_converged(drawn):
    truth, x, y = drawn
    noise = 0.01 * np.random.default_rng(0).standard_normal(y.shape)
    network = learn_relu_network(x, y + noise, WIDTH, key=KEY)
    assert not network.converged
    floor = np.sum(noise**2) / np.sum((y + noise - (y + noise).mean(axis=0)) ** 2)
    assert 0.98 < network.residual / floor < 1.02  # 75 unknowns fit little of the noise in 10⁵ numbers
    assert function_error(network, truth, fresh(N)) < floor / 10


@pytest.mark.parametrize("kind", ["uniform", "shifted"])
def test_inputs_that_are_not_gaussian_are_warned_about_where_they_were_given(drawn, kind):
    truth, x, _ = drawn
    x = x + 0.1 if kind == "shifted" else np.random.default_rng(0).uniform(-1, 1, x.shape)
    with pytest.warns(NotGaussianWarning, match="input|inputs") as caught:
        learn_relu_network(x, np.asarray(truth(x)), WIDTH, key=KEY)
    assert [warning.filename for warning in caught] == [__file__]


@slow
def test_moments_alone_err_by_one_over_the_samples():
    """The squared error falls as 1/N; sixteen times as many samples, five networks."""

    def error(seed, count):
        truth, x, y = draw(seed, count=count)
        return function_error(start_from_moments(x, y, WIDTH, key=KEY), truth, fresh(N))

    falls = [math.log(error(seed, 5000) / error(seed, 80_000)) for seed in range(5)]
    assert 16 / 3 < math.exp(np.mean(falls)) < 16 * 3


# --- what is refused ---


def too_wide(drawn):
    """One neuron and noise, of which two are to be made."""
    _, x, _ = drawn
    rng = np.random.default_rng(0)
    return x, np.maximum(x[:, :1], 0) + 0.1 * rng.standard_normal((COUNT, 1)), 2


def dependent_inputs(drawn):
    _, x, y = drawn
    return np.concatenate([x[:, :-1], x[:, :1] + x[:, 1:2]], axis=1), y, WIDTH


def with_nan(drawn):
    _, x, y = drawn
    y = y.copy()
    y[17, 3] = np.nan
    return x, y, WIDTH


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            lambda drawn: (*drawn[1:], 11),
            "width 11 with 10 inputs: the columns of W must be linearly independent, so at most 10",
        ),
        (
            lambda drawn: (*drawn[1:], 4),
            "the outputs span 5 dimensions, but a network of width 4 can only produce 4",
        ),
        (with_nan, "the samples contain non-finite values"),
        (lambda drawn: (drawn[1], 0 * drawn[2], WIDTH), "all outputs are zero"),
        (lambda drawn: (drawn[1], 0 * drawn[2] + 3, WIDTH), "the outputs are constant"),
        (dependent_inputs, "the inputs span 9 dimensions; all 10 are needed"),
        (
            lambda drawn: (drawn[1][:49], drawn[2][:49], WIDTH),
            "49 samples are too few: with fewer than 50 a perfect fit proves nothing",
        ),
        (
            lambda drawn: (drawn[1][:109], drawn[2][:109, :1], WIDTH),
            "109 samples are too few: with fewer than 110 a perfect fit proves nothing",
        ),
        (too_wide, "2e-02 of the outputs' power is unexplained, and only 1 of 2 directions stand out from the sampling noise"),
        (lambda drawn: (*drawn[1:], 0), "width must be a whole number from 1, got 0"),
        (lambda drawn: (*drawn[1:], 2.5), "width must be a whole number from 1, got 2.5"),
        (lambda drawn: (*drawn[1:], True), "width must be a whole number from 1, got True"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_the_reason(drawn, samples, message):
    x, y, width = samples(drawn)
    with pytest.raises(SampleError, match=message):
        learn_relu_network(x, y, width, key=KEY)


def test_noise_in_dependent_outputs_is_refused(drawn):
    _, x, y = drawn
    more = np.concatenate([y, y[:, :1]], axis=1) + 1e-3 * np.random.default_rng(0).standard_normal((COUNT, OUTPUTS + 1))
    with pytest.raises(SampleError, match=r"span 6 dimensions.* or y is not relu\(x W\) A without noise"):
        learn_relu_network(x, more, WIDTH, key=KEY)


# --- what is drawn to be learned ---


@pytest.mark.parametrize("sizes", [(3, 5, 2), (3, 0, 2), (3, 2, 0), (3.0, 2, 2)])
def test_networks_of_other_sizes_are_not_drawn(sizes):
    with pytest.raises(ValueError, match="must be whole numbers from 1, with width at most n"):
        draw_network(KEY, *sizes)


def test_networks_are_drawn_with_the_condition_that_was_asked_for_and_outputs_of_variance_one():
    network, straight = (draw_network(jax.random.key(3), N, WIDTH, OUTPUTS, condition=condition) for condition in (2.5, 1.0))
    products = straight.w.T @ straight.w  # of columns at right angles, whatever their lengths
    np.testing.assert_allclose(products, np.diag(np.diagonal(products)), atol=1e-12)
    # The lengths of A's rows are in W's columns: nearly the same ones where A has many columns.
    many = draw_network(jax.random.key(3), N, WIDTH, 10_000, condition=2.5)
    np.testing.assert_allclose(np.linalg.cond(many.w), 2.5, rtol=0.05)
    np.testing.assert_allclose(jnp.linalg.norm(network.a, axis=1), 1, rtol=1e-12)
    x, y = draw_samples(jax.random.key(4), network, 100_000)
    np.testing.assert_allclose(y[:100], np.maximum(x[:100] @ network.w, 0) @ network.a, atol=1e-10)
    squares = (y - y.mean(axis=0)) ** 2
    assert (abs(squares.mean(axis=0) - 1) < 5 * squares.std(axis=0) / math.sqrt(len(y))).all()
    moment = x.T @ x / len(x)
    assert abs(moment - jnp.eye(N)).max() < 5 * math.sqrt(2 / len(x))
