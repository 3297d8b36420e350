"""A hidden layer that is observed is found to rounding."""

import warnings

import jax
import numpy as np
import pytest

from lowrank_jax.experiment.hosts.sharding import make_mesh
from lowrank_jax.theory import SampleError, learn_relu_network, observed
from lowrank_jax.theory.samples import from_arrays


def learn(x, y, **kwargs):
    return learn_relu_network(x, y, y.shape[1], key=jax.random.key(0), hidden_observed=True, **kwargs)


def draw(seed, n=6, m=9, count=60):
    rng = np.random.default_rng(seed)
    w, x = rng.standard_normal((n, m)), rng.standard_normal((count, n))
    return w, x, np.maximum(x @ w, 0)


def relative(found, w):
    return np.linalg.norm(found - w) / np.linalg.norm(w)


def test_four_samples_an_input_determine_it_to_rounding():
    w, x, y = draw(0, 64, 256, 4 * 64)
    network = learn(x, y)
    assert relative(network.w, w) < 1e-10
    np.testing.assert_array_equal(network.a, np.eye(256))
    assert network.converged
    assert network.residual < 1e-24


def test_more_inputs_than_outputs_and_fewer():
    for n, m in ((6, 1), (6, 9)):
        w, x, y = draw(1, n, m)
        assert relative(learn(x, y).w, w) < 1e-12


@pytest.mark.slow
def test_about_two_samples_an_input_suffice():
    """Of 2n + 6√n samples of a symmetric input more than n are active, but for one column in 10⁴."""
    n = 40
    w, x, y = draw(2, n, 30, 2 * n + round(6 * n**0.5))
    assert relative(learn(x, y).w, w) < 1e-8


def test_inputs_need_not_be_gaussian():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((6, 9))
    for x in (rng.uniform(-1, 2, (60, 6)), rng.choice([-1.0, 1.0], (60, 6)) + 0.1 * rng.standard_normal((60, 6))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = learn(x, np.maximum(x @ w, 0))
        assert relative(network.w, w) < 1e-10


def test_a_column_that_is_never_active_is_zero():
    w, x, y = draw(4)
    w[:, 2] = y[:, 2] = 0
    network = learn(x, y)
    np.testing.assert_array_equal(network.w[:, 2], 0)
    assert relative(network.w, w) < 1e-12
    assert network.converged


def test_samples_are_read_until_rare_columns_are_active_often_enough():
    rng = np.random.default_rng(5)
    w, x = rng.standard_normal((4, 3)), rng.normal([3, 0, 0, 0], 1, (40_000, 4))
    w[:, 1] = [-1, 0.3, 0, 0]  # active once in 500 samples: not 8 times in the first batch
    y = np.maximum(x @ w, 0)
    assert 4 * 2**14 > len(x) > 2**14
    assert 0 < np.mean(y[:, 1] > 0) < 0.01
    assert relative(learn(x, y).w, w) < 1e-9
    few, _ = observed._enough(from_arrays(x, y[:, [0, 2]]))
    assert len(few) < len(x)


def test_devices_share_the_samples():
    w, x, y = draw(6)
    assert relative(learn(x, y, mesh=make_mesh()).w, w) < 1e-12


def test_float32_is_learned_in_float32():
    w, x, y = (part.astype(np.float32) for part in draw(7))
    network = learn(x, y)
    assert network.w.dtype == np.float32
    assert relative(network.w, w) < 1e-5
    assert network.converged


def test_other_functions_do_not_converge():
    w, x, _ = draw(8)
    network = learn(x, np.maximum(x @ w + 0.5, 0))
    assert not network.converged
    assert network.residual > 1e-3


def short():
    _, x, y = draw(9)
    y[np.flatnonzero(y[:, 4])[3:], 4] = 0
    return x, y, 9


def flat():
    w, x, _ = draw(9)
    x[:, 5] = x[:, 0]
    return x, np.maximum(x @ w, 0), 9


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (short, "column 4 of y is positive in only 3 samples; 6 are needed, which takes about 12 samples"),
        (lambda: (*draw(9, count=5)[1:], 9), r"5 samples of 6 inputs are too few: about 12 are needed"),
        (flat, "the samples where column 0 of y is positive do not span all 6 inputs"),
        (lambda: (draw(9)[1], -draw(9)[2], 9), "y has negative values, so it is not the output of a ReLU layer"),
        (lambda: (*draw(9)[1:], 5), "with hidden_observed, y needs one column per hidden unit: it has 9, and width is 5"),
    ],
)
def test_what_does_not_determine_it_is_refused(samples, message):
    x, y, width = samples()
    with pytest.raises(SampleError, match=message):
        learn_relu_network(x, y, width, key=jax.random.key(0), hidden_observed=True)
