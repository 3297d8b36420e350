"""The best low-rank network from samples of one that is not low-rank; its risks against sampling and the projection itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import matrix
from lowrank_jax.theory import draw_network, draw_samples, learn_low_rank, low_rank

N, WIDTH, OUTPUTS, RANK = 10, 5, 5, 2
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def truth():
    return draw_network(jax.random.key(0), N, WIDTH, OUTPUTS)


@pytest.fixture(scope="module")
def standard(truth):
    return draw_samples(jax.random.key(1), truth, 20_000)


@pytest.fixture(scope="module")
def correlated(truth, standard):
    x = standard[0] @ (jnp.eye(N) + 0.5 * jax.random.normal(jax.random.key(2), (N, N)))
    return x, truth(x)


@pytest.fixture(scope="module")
def learned(standard):
    return learn_low_rank(*standard, WIDTH, RANK, key=KEY)


@pytest.fixture(scope="module")
def learned_of_correlated(correlated):
    return learn_low_rank(*correlated, WIDTH, RANK, key=KEY)


def assert_within(values, exact, errors=5):
    assert abs(values.mean() - exact) < errors * values.std() / math.sqrt(len(values))


def relu(x):
    return np.maximum(x, 0)


def assert_risks_are_those_of(network, x):
    """All four are means over these inputs."""
    full, short = (relu(x @ np.asarray(kernel)) for kernel in (network.learned.w, network.u @ network.v))
    assert_within(np.sum((full - short) ** 2, axis=1), network.risk)
    assert_within(np.sum(full**2, axis=1), network.whole)
    wanted = full @ np.asarray(network.learned.a)
    variance = np.sum((wanted - wanted.mean(axis=0)) ** 2) / len(x)
    lost = np.sum((wanted - network(x)) ** 2, axis=1)
    assert_within(lost / variance, network.output_risk)
    # No other A loses less: at the optimum what is left is at right angles to the hidden layer.
    rest = short[:, :, None] * (wanted - network(x))[:, None, :]
    assert (abs(rest.mean(axis=0)) < 5 * rest.std(axis=0) / math.sqrt(len(x))).all()


@pytest.mark.slow
def test_risks_are_what_sampling_gives(learned):
    assert_risks_are_those_of(learned, np.random.default_rng(0).standard_normal((200_000, N)))


def test_risks_under_correlated_inputs_are_what_sampling_them_gives(learned_of_correlated, correlated):
    x, _ = correlated
    root = np.linalg.cholesky(x.T @ x / len(x))  # of the samples' own second moment, as is promised
    assert_risks_are_those_of(learned_of_correlated, np.random.default_rng(0).standard_normal((200_000, N)) @ root.T)


def test_the_risk_is_the_projections_own(learned):
    assert learned.learned.converged
    np.testing.assert_allclose(jnp.linalg.norm(learned.learned.a, axis=1), 1, rtol=1e-12)
    w = learned.learned.w
    np.testing.assert_allclose(learned.risk, matrix.risk(w, learned.u @ learned.v), rtol=1e-10)
    np.testing.assert_allclose(learned.whole, jnp.sum(w**2) / 2, rtol=1e-12)


def in_order_of(network, w):
    """U V, its columns in the order of those of W that they stand for."""
    cosines = w.T @ network.learned.w / jnp.linalg.norm(w, axis=0)[:, None] / jnp.linalg.norm(network.learned.w, axis=0)
    order = np.argmax(np.asarray(cosines), axis=1)
    assert sorted(order) == [*range(WIDTH)]
    return network.u @ network.v[:, order]


@pytest.mark.parametrize("subspace", ["top", pytest.param("search", marks=pytest.mark.slow), "refine"])
def test_it_is_as_good_as_the_projection_of_the_network_that_was_not_seen(truth, standard, learned, subspace):
    made = {"refine": learned}  # the default
    network = made.get(subspace) or learn_low_rank(*standard, WIDTH, RANK, key=KEY, subspace=subspace)
    assert np.linalg.matrix_rank(truth.w) == WIDTH
    assert np.linalg.matrix_rank(network.u @ network.v) == RANK
    best = matrix.kernel_projection(truth.w, RANK, subspace=subspace)
    least, whole = (matrix.risk(truth.w, other) for other in (best[0] @ best[1], 0 * truth.w))
    assert least > 0.05 * whole
    assert matrix.risk(truth.w, in_order_of(network, truth.w)) - least < 1e-6 * least
    assert network.bound <= network.optimum <= network.risk * (1 + 1e-12) < network.whole


def test_the_correlation_of_inputs_is_heeded(truth, learned_of_correlated, correlated):
    """Over the samples themselves it loses less than the projection of the true W for independent inputs does."""
    x, _ = correlated
    u, v = matrix.kernel_projection(truth.w, RANK, subspace="refine")
    ours = in_order_of(learned_of_correlated, truth.w)
    lost, without = (np.mean(np.sum((relu(x @ truth.w) - relu(x @ y)) ** 2, axis=1)) for y in (ours, u @ v))
    assert lost < 0.95 * without
    assert learned_of_correlated.bound <= learned_of_correlated.optimum <= learned_of_correlated.risk * (1 + 1e-12)


def test_at_full_rank_nothing_is_lost(truth, standard):
    network = learn_low_rank(*standard, WIDTH, WIDTH, key=KEY)
    assert abs(network.risk) < 1e-12 * network.whole
    assert abs(network.output_risk) < 1e-12
    assert abs(network.bound) < 1e-12 * network.whole
    x = np.random.default_rng(1).standard_normal((100, N))
    np.testing.assert_allclose(network(x), truth(x), atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_hidden_units_that_rank_one_makes_alike_leave_a_good_output_layer(truth, standard, dtype):
    """Their Gram matrix is singular, of rank two: all that they make is relu(z) and relu(-z) of one z."""
    w, a = truth.w.astype(dtype), truth.a.astype(dtype)
    u, v = matrix.kernel_projection(w, 1)
    fitted, risk = low_rank._outputs(w, a, u @ v, False)
    x, wanted = standard
    both = relu(np.outer(x @ u[:, 0], [1, -1]))
    best = both @ np.linalg.lstsq(both, wanted, rcond=None)[0]
    power = np.sum((wanted - wanted.mean(axis=0)) ** 2)
    for made in (best, relu(x @ u @ v) @ fitted):
        np.testing.assert_allclose(risk, np.sum((wanted - made) ** 2) / power, rtol=0.05)


def test_an_observed_layer_keeps_the_identity():
    w = jax.random.normal(jax.random.key(3), (N, WIDTH))
    x = jax.random.normal(jax.random.key(4), (100, N))
    network = learn_low_rank(x, relu(x @ w), WIDTH, RANK, key=KEY, hidden_observed=True)
    np.testing.assert_array_equal(network.a, np.eye(WIDTH))
    np.testing.assert_allclose(network.learned.w, w, atol=1e-10)
    variance = np.sum(w**2) * (1 / 2 - 1 / (2 * np.pi))
    np.testing.assert_allclose(network.output_risk, network.risk / variance, rtol=1e-9)
    assert network.bound <= network.optimum <= network.risk * (1 + 1e-12) < network.whole


def test_a_layer_that_is_never_active_loses_nothing():
    x = np.random.default_rng(0).standard_normal((100, N))
    network = learn_low_rank(x, np.zeros((100, WIDTH)), WIDTH, RANK, key=KEY, hidden_observed=True)
    assert (network.risk, network.whole, network.output_risk) == (0, 0, 0)
    assert not network(x).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": "5"}, "width must be a whole number from 1, got '5'"),
        ({"rank": 0}, r"rank must be a whole number from 1 to min\(10 inputs, width 5\), got 0"),
        ({"rank": 6}, r"rank must be a whole number from 1 to min\(10 inputs, width 5\), got 6"),
        ({"rank": 1.5}, r"rank must be .*, got 1.5"),
        ({"rank": True}, r"rank must be .*, got True"),
        ({"rank": 2, "subspace": "refined"}, "unknown subspace 'refined'; did you mean refine"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(monkeypatch, standard, arguments, message):
    def worked(*_):
        raise AssertionError("learning began")

    monkeypatch.setattr(low_rank, "learn", worked)
    with pytest.raises(ValueError, match=message):
        learn_low_rank(*standard, **{"width": WIDTH, "rank": 2} | arguments, key=KEY)
