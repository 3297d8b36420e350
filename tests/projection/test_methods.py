import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import methods
from lowrank_jax.projection.methods import METHODS
from lowrank_jax.projection.sampled import Stack

W = jax.random.normal(jax.random.key(0), (12, 20)) / np.sqrt(6)
UNBALANCED = {"spectral_column_scales", "random"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "activation"), [(jnp.float32, "relu"), (jnp.bfloat16, "silu")])
def test_every_method_gives_finite_factors_in_the_kernels_dtype(method, dtype, activation):
    u, v = methods.factor(method, jax.random.key(1), W.astype(dtype), 3, activation=activation, group=2)
    assert (u.shape, v.shape) == ((12, 3), (3, 20))
    assert u.dtype == v.dtype == dtype
    u, v = u.astype(jnp.float32), v.astype(jnp.float32)
    assert np.isfinite(u).all() and np.isfinite(v).all()
    if method not in UNBALANCED:
        np.testing.assert_allclose(u.T @ u, v @ v.T, atol=1e-4 if dtype == jnp.float32 else 0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_is_its_matrices_one_by_one(method):
    keys = jax.random.split(jax.random.key(1), 2)
    [(u, v)] = METHODS[method]([Stack(keys, jnp.stack([W, 2 * W[::-1]]), 3)])
    one, other = methods.factor(method, keys[1], 2 * W[::-1], 3)
    np.testing.assert_allclose(u[1] @ v[1], one @ other, atol=1e-4)


def test_kernels_of_other_shapes_ranks_and_activations_change_nothing():
    """The first two are padded to one shape; the last is too large for that, and is done first."""
    described = [((8, 9), 3, "gelu"), ((8, 10), 4, "relu"), ((420, 420), 3, "relu")]
    stacks = [
        Stack(None, jax.random.normal(jax.random.key(rank), (1, *shape)), rank, activation)
        for shape, rank, activation in described
    ]
    for stack, (u, v) in zip(stacks, METHODS["kernel_projection"](stacks), strict=True):
        one, other = methods.factor("kernel_projection", jax.random.key(0), stack.w[0], stack.rank, activation=stack.activation)
        np.testing.assert_allclose(u[0] @ v[0], one @ other, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_decided_by_the_key(method):
    first, again, other = (methods.factor(method, jax.random.key(k), W, 2)[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    draws = method in ("random", "random_subspace", "function_approximation")
    assert np.array_equal(first, other) != draws


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_gets_one_clear_error(method):
    with pytest.raises(ValueError, match="12x20 matrix has elements that are not finite"):
        methods.factor(method, jax.random.key(1), W.at[0, 0].set(jnp.nan), 3)
    with pytest.raises(ValueError, match="rank 13 of a 12x20 matrix"):
        methods.factor(method, jax.random.key(1), W, 13)
    with pytest.raises(ValueError, match="unknown activation 'rel'; did you mean relu"):
        methods.factor(method, jax.random.key(1), W, 3, activation="rel")


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="unknown method 'spectrl'; did you mean spectral"):
        methods.factor("spectrl", jax.random.key(1), W, 3)
