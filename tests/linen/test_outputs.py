"""What layers return, example by example."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.linen.outputs import capture
from tests import drawn

X = np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32)


class Net(nn.Module):
    """Layers that get examples first, examples and positions in one axis, and positions first."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(3, name="first")(x)
        flat = nn.Dense(3, name="flat")(y.reshape(-1, 3))
        turned = nn.Dense(2, name="turned")(flat.reshape(y.shape).swapaxes(0, 1)[:3])
        return nn.Dense(2, name="last")(flat).reshape(len(x), -1), turned


def captured(model, variables, kernels, examples):
    return jax.jit(lambda v: capture(lambda more: lr.apply(model, v, X, mutable=more), kernels, examples)[:2])(variables)[1]


def test_outputs_are_by_example_or_their_layer_is_left_out():
    variables = drawn.variables(Net(), X)
    names = [f"{name}/kernel" for name in ("first", "flat", "turned", "nowhere")]
    found = {}

    @jax.jit
    def run(variables):
        returned, outputs, unseen = capture(lambda more: lr.apply(Net(), variables, X, mutable=more), names, 6)
        found.update(unseen)
        return returned, outputs

    returned, outputs = run(variables)
    one = X @ variables["params"]["first"]["kernel"] + variables["params"]["first"]["bias"]
    two = one @ variables["params"]["flat"]["kernel"] + variables["params"]["flat"]["bias"]
    np.testing.assert_allclose(outputs["first/kernel"][0], one.reshape(6, 12), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs["flat/kernel"][0], two.reshape(6, 12), rtol=1e-5, atol=1e-5)
    assert found == {
        "turned/kernel": "the 6 examples are not the first axis of its layer's output [3, 6, 2]",
        "nowhere/kernel": "its layer is not known, or this call does not use it",
    }
    np.testing.assert_allclose(returned[0], Net().apply(variables, X)[0], rtol=1e-5, atol=1e-5)
    assert captured(Net(), variables, names, None).keys() == {"first/kernel", "flat/kernel", "turned/kernel"}


def test_a_layer_that_is_used_where_nothing_can_be_written_is_left_out_even_if_it_is_seen_elsewhere():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(5, name="dense")
            turns = nn.scan(
                lambda layer, x, _: (nn.tanh(layer(x)), None),
                variable_broadcast="params",
                split_rngs={"params": False},
                length=3,
            )
            return turns(layer, nn.tanh(layer(x)), None)[0]

    variables = drawn.variables(Tied(), X)
    assert captured(Tied(), variables, ["dense/kernel"], None) == {}


def test_without_kernels_a_model_is_called_as_ever():
    returned, outputs, unseen = capture(lambda more: (jnp.ones(2), {"more": more}), [])
    assert (outputs, unseen) == ({}, {}) and returned.shape == (2,)


@pytest.mark.parametrize("jitted", [False, True])
def test_modules_of_one_class_do_not_share_what_they_write(jitted):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.jit(nn.Dense) if jitted else nn.Dense
            return layer(5, name="one")(layer(5, name="two")(x))

    variables = drawn.variables(Two(), X)
    found = captured(Two(), variables, ["one/kernel", "two/kernel"], None)
    two = X @ variables["params"]["two"]["kernel"] + variables["params"]["two"]["bias"]
    one = two @ variables["params"]["one"]["kernel"] + variables["params"]["one"]["bias"]
    for name, expected in (("one/kernel", one), ("two/kernel", two)):
        np.testing.assert_allclose(found[name][0].reshape(X.shape), expected, rtol=1e-4, atol=1e-5)
