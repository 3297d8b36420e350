"""Factor pairs through flax.serialization."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.core import freeze
from flax.traverse_util import flatten_dict

from lowrank_jax import LowRankKernel
from lowrank_jax.kernel import channel_view, dense_view, spatial_view


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tree(dtype=jnp.float32):
    spatial = spatial_view((3, 3, 4, 6)).from_factors(normal(12, 2), normal(2, 18), "merged")
    stacked = dense_view((5, 4)).from_factors(normal(3, 5, 1), normal(3, 1, 4), "premerged")
    params = {"conv": {"kernel": spatial, "bias": normal(6)}, "blocks": {"kernel": stacked}}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_and_state_dicts_come_back_with_a_target(dtype):
    params = tree(dtype)
    target = jax.tree.map(jnp.zeros_like, params)
    assert_same(serialization.from_bytes(target, serialization.to_bytes(params)), params)
    assert_same(serialization.from_state_dict(target, serialization.to_state_dict(params)), params)
    frozen = freeze(params)
    assert_same(serialization.from_bytes(freeze(target), serialization.to_bytes(frozen)), frozen)


def test_a_state_dict_has_a_leaf_for_every_array():
    state = serialization.to_state_dict(tree())
    assert sorted(flatten_dict(state, sep="/")) == [
        "blocks/kernel/u",
        "blocks/kernel/v",
        "conv/bias",
        "conv/kernel/u",
        "conv/kernel/v",
    ]


def test_boxes_of_the_target_stay():
    pair = channel_view((3, 3, 2, 8)).from_factors(normal(18, 2), normal(2, 8))
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * (x.ndim - 1) + ("model",)), {"kernel": pair})
    found = serialization.from_bytes(jax.tree.map(jnp.zeros_like, boxed), serialization.to_bytes(boxed))
    assert_same(found, boxed)


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (normal(3, 3, 4, 6), "kernel: expected the factors u and v of a LowRankKernel, found ndarray"),
        ({"u": normal(12, 2)}, r"found \['u'\]"),
        ({"u": normal(3, 3, 4, 2), "v": normal(2, 6)}, r"kernel: u has shape \[3, 3, 4, 2\], not that of rows \(0, 2\)"),
    ],
)
def test_what_is_no_pair_of_these_rows_is_refused(state, problem):
    target = {"kernel": spatial_view((3, 3, 4, 6)).from_factors(normal(12, 2), normal(2, 18))}
    with pytest.raises(ValueError, match=problem):
        serialization.from_state_dict(target, {"kernel": state})


def test_other_ranks_than_the_targets_are_restored_as_they_are():
    low, high = (dense_view((5, 4)).from_factors(normal(5, rank), normal(rank, 4)) for rank in (1, 3))
    restored = serialization.from_bytes(low, serialization.to_bytes(high))
    assert isinstance(restored, LowRankKernel) and restored.rank == 3


def test_the_class_alone_is_registered():
    code = "import lowrank_jax as lr, flax.serialization as s; print(len(s.to_bytes(lr.LowRankKernel(1, 2))) > 0)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
