import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from lowrank_jax.kernel import LowRankKernel, MatrixView, channel_view, dense_view, spatial_view

shapes = st.sampled_from([(2, 3), (1, 4), (2, 3, 4), (3, 2, 4, 5)])


@given(shapes, st.data())
def test_a_view_and_its_inverse_cancel(shape, data):
    rows = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape) - 1))))
    stack = data.draw(st.sampled_from([(), (3,), (2, 3)]))
    view = MatrixView(shape, rows)
    kernel = np.random.default_rng(0).standard_normal((*stack, *shape))
    matrix = view.to_matrix(kernel)
    assert matrix.shape == (*stack, view.n, view.m)
    np.testing.assert_array_equal(view.from_matrix(matrix), kernel)


@pytest.mark.parametrize(
    "view", [dense_view((6, 4)), dense_view((2, 3, 4), 2), channel_view((3, 2, 4, 5)), spatial_view((3, 2, 4, 5))]
)
@pytest.mark.parametrize("stack", [(), (2,)])
def test_factors_merge_to_the_product_in_the_kernels_shape(view, stack):
    rng = np.random.default_rng(0)
    u, v = (rng.standard_normal(shape, np.float32) for shape in ((*stack, view.n, 2), (*stack, 2, view.m)))
    kernel = view.from_factors(u, v)
    assert kernel.shape == (*stack, *view.shape)
    assert kernel.view == MatrixView(view.shape, view.rows)
    assert (kernel.rank, kernel.stack) == (2, stack)
    np.testing.assert_allclose(view.to_matrix(np.asarray(kernel.merge())), u @ v, rtol=1e-5, atol=1e-6)


def test_spatial_columns_of_one_output_lie_a_group_apart():
    view = spatial_view((3, 2, 4, 5))
    kernel = np.zeros((3, 2, 4, 5))
    kernel[..., 1] = 1
    columns = np.flatnonzero(view.to_matrix(kernel).any(0))
    assert view.group == 2
    assert set(columns % (view.m // view.group)) == {1}


def test_a_factor_pair_is_two_leaves_and_survives_tree_operations():
    kernel = LowRankKernel(np.ones((3, 3, 2, 1), np.float32), np.ones((1, 4), np.float32), (0, 1, 2))
    doubled = jax.tree.map(lambda x: 2 * x, kernel)
    assert len(jax.tree.leaves(kernel)) == 2
    assert doubled.rows == (0, 1, 2)
    np.testing.assert_allclose(doubled.merge(), 4 * kernel.merge())


def test_bfloat16_factors_are_multiplied_in_float32():
    rng = np.random.default_rng(0)
    u, v = (rng.standard_normal(shape).astype(jnp.bfloat16) for shape in ((64, 32), (32, 64)))
    exact = np.asarray(u, np.float64) @ np.asarray(v, np.float64)
    merged = LowRankKernel(u, v).merge()
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(merged, np.float64), exact, rtol=2**-8, atol=1e-6)  # one rounding, not 32


def conv_pair(dtype: Any = np.float32, execution="factored"):
    view = channel_view((1, 1, 64, 256))
    rng = np.random.default_rng(0)
    return view.from_factors(
        jnp.asarray(rng.standard_normal((64, 6)), dtype), jnp.asarray(rng.standard_normal((6, 256)), dtype), execution
    )


def test_a_pair_has_the_shape_of_its_kernel_and_the_bytes_of_its_factors():
    pair, dense = conv_pair(), np.zeros((1, 1, 64, 256), np.float32)
    assert (pair.shape, pair.ndim, pair.size, pair.dtype) == (dense.shape, dense.ndim, dense.size, dense.dtype)
    assert pair.nbytes == pair.u.nbytes + pair.v.nbytes == 4 * 6 * (64 + 256)


def test_astype_casts_both_factors_and_keeps_the_rest():
    pair = conv_pair(execution="merged")
    half = pair.astype(jnp.bfloat16)
    assert (half.u.dtype, half.v.dtype, half.dtype) == (jnp.bfloat16,) * 3
    assert (half.rows, half.execution, half.shape) == (pair.rows, "merged", pair.shape)
    np.testing.assert_array_equal(half.u, pair.u.astype(jnp.bfloat16))


def test_a_pair_says_what_it_is():
    pair, text = conv_pair(), "LowRankKernel(1x1x64x256, rank 6, factored, float32)"
    assert repr(pair) == text
    assert repr(jax.eval_shape(lambda: pair)) == text
    assert pair._repr_html_() == f"<code>{text}</code>"
    seen = []
    jax.make_jaxpr(lambda pair: seen.append(repr(pair)))(pair)
    assert seen == [text]
    assert repr(jax.tree.map(lambda x: nn.Partitioned(x, ("a",) * x.ndim), pair)) == text


@pytest.mark.parametrize("leaf", [None, PartitionSpec("data"), True, 1.5, np.float32(3), optax.MaskedNode(), object(), "<a>"])
def test_factors_that_are_no_arrays_are_shown_as_they_are(leaf):
    pair = LowRankKernel(leaf, leaf, (0, 1, 2), "merged")
    assert repr(pair) == f"LowRankKernel(u={leaf!r}, v={leaf!r}, rows=(0, 1, 2), execution='merged')"
    assert "<a>" not in pair._repr_html_()


@pytest.mark.parametrize("execution", ["factored", "merged", "premerged"])
def test_a_program_with_pairs_as_arguments_is_exported(execution):
    pair = spatial_view((3, 2, 4, 5)).from_factors(np.ones((12, 2), np.float32), np.ones((2, 10), np.float32), execution)
    blob = jax.export.export(jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree)))({"kernel": pair}).serialize()
    doubled = jax.export.deserialize(blob).call({"kernel": pair})["kernel"]
    assert (doubled.rows, doubled.execution) == (pair.rows, execution)
    np.testing.assert_array_equal(doubled.v, 2 * pair.v)
    with pytest.raises(ValueError, match="pytree"):  # which axes are rows is part of what the program takes
        jax.export.deserialize(blob).call({"kernel": dataclasses.replace(pair, rows=(0, 1))})
