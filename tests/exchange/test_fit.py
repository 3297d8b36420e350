"""Arrays by path as a model's variables: all that is wrong is told at once, and nothing is converted that changes."""

import re
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowrank_jax.exchange.fit import fitted


def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


SHAPES = {
    "batch_stats": {"norm": {"mean": of(jnp.float32, 3)}},
    "params": {"head": {"bias": of(jnp.float32, 2), "kernel": of(jnp.float32, 3, 2)}},
}


def arrays():
    return {
        "params/head/kernel": np.arange(6, dtype=np.float32).reshape(3, 2),
        "params/head/bias": np.ones(2, np.float32),
        "batch_stats/norm/mean": np.full(3, 2, np.float32),
    }


def test_arrays_take_their_places():
    found = fitted(arrays(), SHAPES)
    assert jax.tree.structure(found) == jax.tree.structure(SHAPES)
    np.testing.assert_array_equal(found["params"]["head"]["kernel"], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(found["batch_stats"]["norm"]["mean"], [2, 2, 2])
    again = fitted(lambda shapes: arrays() if shapes is SHAPES else {}, SHAPES)
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_the_arrays_are_the_models_own():
    given = arrays()
    found = fitted(given, SHAPES)
    found["params"]["head"]["bias"][:] = 7
    assert given["params/head/bias"].tolist() == [1, 1]


def test_the_tree_is_that_of_the_model():
    """A key with a slash in it, as those of `nn.WeightNorm`, is one key; a collection without arrays stays."""
    shapes = {"params": {"norm": {"dense/kernel/scale": of(jnp.float32, 2)}}, "cache": {}}
    found = fitted({"params/norm/dense/kernel/scale": np.ones(2, np.float32)}, shapes)
    assert found.keys() == {"params", "cache"} and found["params"]["norm"].keys() == {"dense/kernel/scale"}


def test_everything_that_is_wrong_is_told():
    given = {
        "params/head/kernel": np.ones((2, 3), np.float32),
        "params/head/biases": np.ones(2, np.float32),
        "batch_stats/norm/mean": np.float32([1, np.nan, 3]),
        "extra\x1b[2J\ud800": np.ones(1),
    }
    with pytest.raises(ValueError) as caught:
        fitted(given, SHAPES)
    assert str(caught.value).splitlines() == [
        "the weights do not fit the model:",
        "  params/head/bias: has no array",
        "  params/head/biases: is left over; did you mean params/head/bias?",
        "  extra\\x1b[2J\\ud800: is left over",
        "  batch_stats/norm/mean: has values that are not finite",
        "  params/head/kernel: is [2, 3], not [3, 2]",
    ]


def test_nothing_at_all_is_told_too():
    with pytest.raises(ValueError, match=r"(?s)norm/mean: has no array.*head/bias: has no array.*head/kernel: has no array$"):
        fitted({}, SHAPES)
    with pytest.raises(ValueError, match=r"a: is left over$"):
        fitted({"a": np.ones(2)}, {})
    assert fitted({}, {}) == {}


def test_many_names_that_are_left_over_do_not_take_minutes():
    """Similar names are looked up for the first: for a thousand among a thousand it would take this long."""
    shapes = {f"stage1/block{i}/conv{i}/kernel": of(jnp.float32) for i in range(1000)}
    start = time.process_time()
    with pytest.raises(ValueError) as caught:
        fitted({f"stage1/block{i}/convolution{i}/kernel": np.float32(1) for i in range(1000)}, shapes)
    assert time.process_time() - start < 5
    assert len(re.findall("did you mean", str(caught.value))) == 10 and len(str(caught.value).splitlines()) == 2001


CONVERTED = [
    (np.float64([1.5, -2]), jnp.float32),
    (np.float16([1.5, -2]), jnp.float32),
    (np.array([1.5, -2], ml_dtypes.bfloat16), jnp.float32),
    (np.float32([1.5, -2]), jnp.bfloat16),
    (np.float32([1.5, -2]), jnp.float16),
    (np.int64([1, -2]), jnp.int32),
    (np.uint8([1, 255]), jnp.int32),
    (np.array([True, False]), jnp.bool_),
    (np.float64([1e300, 2]), np.float64),
]


@pytest.mark.parametrize(("value", "dtype"), CONVERTED)
def test_numbers_are_converted_within_their_kind(value, dtype):
    found = fitted({"a": value}, {"a": of(dtype, 2)})["a"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float64), value.astype(np.float64))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.int32([1, 2]), jnp.float32, "is int32, not float32"),
        (np.float32([1, 2]), jnp.int32, "is float32, not int32"),
        (np.array([True, False]), jnp.float32, "is bool, not float32"),
        (np.array([True, False]), jnp.int32, "is bool, not int32"),
        (np.int32([1, 0]), jnp.bool_, "is int32, not bool"),
        (np.complex64([1, 2]), jnp.float32, "is complex64, not float32"),
        (np.float32([1, 2]), jnp.complex64, "is float32, not complex64"),
        (np.array(["a", "b"]), jnp.float32, "is <U1, not float32"),
        (np.float32([1, np.inf]), jnp.float32, "has values that are not finite"),
        (np.array([1, np.nan], ml_dtypes.bfloat16), jnp.float32, "has values that are not finite"),
        (np.float32([1, 1e5]), jnp.float16, "has values that are too large for float16"),
        (np.float64([1, 1e300]), jnp.float32, "has values that are too large for float32"),
        (np.int64([1, 2**40]), jnp.int32, "has values that are too large for int32"),
        (np.int32([1, -1]), jnp.uint8, "has values that are too large for uint8"),
        (np.float32([1, 2]), jax.random.key(0).dtype, r"is float32, not key<fry>"),
    ],
)
def test_numbers_that_conversion_would_change_are_refused(value, dtype, message):
    with pytest.raises(ValueError, match=f"a: {message}$"):
        fitted({"a": value}, {"a": of(dtype, 2)})


def drawn():
    return {
        "batch_stats": {"norm": {"mean": jnp.zeros(3)}},
        "params": {"head": {"bias": jnp.full(2, 9.0), "kernel": jnp.full((3, 2), 8.0)}},
    }


@pytest.mark.parametrize("pattern", ["head/.*", "params/head/.*", ".*head.*"])
def test_what_a_pattern_matches_is_drawn(pattern):
    given = {**arrays(), "params/head/kernel": np.ones((5, 5))}
    del given["params/head/bias"]
    found = fitted(given, SHAPES, redraw=pattern, draw=drawn)
    assert found["params"]["head"]["bias"].tolist() == [9, 9] and (found["params"]["head"]["kernel"] == 8).all()
    assert found["batch_stats"]["norm"]["mean"].tolist() == [2, 2, 2]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))


def test_nothing_is_drawn_in_vain():
    def fails():
        raise AssertionError("nothing is to be drawn")

    assert fitted(arrays(), SHAPES, draw=fails)
    with pytest.raises(ValueError, match="norm/mean: has no array"):  # before it
        fitted({}, SHAPES, redraw="head/.*", draw=fails)
    with pytest.raises(ValueError, match=r"redraw: 'heads/\.\*' matches no path; "):
        fitted(arrays(), SHAPES, redraw="heads/.*", draw=fails)
    with pytest.raises(ValueError, match="is not a regular expression"):
        fitted(arrays(), SHAPES, redraw="(", draw=fails)


def test_what_is_drawn_does_not_excuse_what_is_left_over():
    with pytest.raises(ValueError, match=r"params/top: is left over$"):
        fitted({**arrays(), "params/top": np.ones(1)}, SHAPES, redraw="head/.*", draw=drawn)
