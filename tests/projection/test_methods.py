import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import methods
from lowrank_jax.projection.methods import METHODS, TWO_SIDED
from lowrank_jax.projection.stack import Stack
from tests.projection import reference
from tests.projection.reference import normal

W = normal(0, 12, 20) / np.float32(np.sqrt(6))
PAIR = np.stack([W, 2 * W[::-1]])
UNBALANCED = {"spectral_column_scales", "random"}
DRAWS = {"random", "random_subspace", "function_approximation"}
SLOW = {  # tested one by one in test_matrix, test_ablations and test_sampled
    "kernel_projection_search",
    "kernel_projection_refine",
    "random_subspace",
    "norm_preserving_refine",
    "function_approximation",
    "spectral_global_scale",
    "spectral_column_scales",
}
EVERY = [
    pytest.param(method, marks=pytest.mark.slow) if method in SLOW else method for method in METHODS if method != TWO_SIDED
]


@functools.cache
def alone(method, key, i=0, dtype=np.float32):
    return [np.asarray(part) for part in methods.factor(method, jax.random.key(key), PAIR[i].astype(dtype), 3, group=2)]


@functools.cache
def together(method, dtype=np.float32):
    """Factors of a stack of two kernels, and of one in another dtype with another activation."""

    @jax.jit
    def factors(ws, half):
        keys = jax.vmap(jax.random.key)(np.arange(2))
        return METHODS[method]([Stack(keys, ws, 3, "relu", 2), Stack(keys[:1], half, 3, "silu", 2)])

    return factors(PAIR.astype(dtype), PAIR[:1].astype(jnp.bfloat16))


@pytest.mark.parametrize("method", EVERY)
def test_every_method_gives_finite_factors_in_the_kernels_dtype(method):
    (_, narrow), made = together(method), alone(method, 0)
    for (u, v), dtype in ((made, jnp.float32), ([part[0] for part in narrow], jnp.bfloat16)):
        assert (u.shape, v.shape) == ((12, 3), (3, 20))
        assert u.dtype == v.dtype == dtype
        u, v = (np.asarray(factor, np.float32) for factor in (u, v))
        assert np.isfinite(u).all()
        assert np.isfinite(v).all()
        if method not in UNBALANCED:
            np.testing.assert_allclose(u.T @ u, v @ v.T, atol=1e-4 if dtype == jnp.float32 else 0.05)


@pytest.mark.parametrize("method", EVERY)
def test_a_stack_is_its_matrices_one_by_one(method):
    # The descent of `refine` ends at a relative gain of 1e-7: in float32 rounding decides at which step that is.
    dtype, atol = (np.float64, 1e-10) if "refine" in method else (np.float32, 1e-4)
    with jax.enable_x64(dtype == np.float64):
        (u, v), _ = together(method, dtype)
        for i in range(2):
            one, other = alone(method, i, i, dtype)
            assert one.dtype == dtype
            np.testing.assert_allclose(np.asarray(u[i]) @ v[i], one @ other, atol=atol)


@pytest.mark.slow
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


@pytest.mark.parametrize("method", EVERY)
def test_factors_are_decided_by_the_key(method):
    first = alone(method, 0)[0]
    again, other = (methods.factor(method, jax.random.key(k), W, 3, group=2)[0] for k in (0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) != (method in DRAWS)


@pytest.mark.parametrize("method", [method for method in METHODS if method != TWO_SIDED])
def test_bad_input_gets_one_clear_error(method):
    broken = W.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="12x20 matrix contains non-finite values"):
        methods.factor(method, jax.random.key(1), broken, 3)
    with pytest.raises(ValueError, match="rank 13 of a 12x20 matrix"):
        methods.factor(method, jax.random.key(1), W, 13)
    with pytest.raises(ValueError, match="unknown activation 'rel'; did you mean relu"):
        methods.factor(method, jax.random.key(1), W, 3, activation="rel")


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="unknown method 'spectrl'; did you mean spectral"):
        methods.factor("spectrl", jax.random.key(1), W, 3)


SIZES = [2.0**128, 2.0**-100, 2.0**-110]  # of kernels with elements up to one; the smallest are near the end of float32


@pytest.mark.parametrize("method", EVERY)
def test_kernels_at_the_ends_of_float32_give_the_same_factors_in_their_size(method):
    w = PAIR[0] / np.float32(1.01 * np.abs(PAIR[0]).max())

    def product(size):
        u, v = methods.factor(method, jax.random.key(0), (w * np.float64(size)).astype(np.float32), 3, group=2)
        return np.asarray(u, np.float64) @ np.asarray(v, np.float64)

    one = product(1)
    assert np.linalg.norm(one) > 0.1 * np.linalg.norm(w)
    for size in SIZES:
        np.testing.assert_allclose(product(size) / (1 if method == "unit_spectral" else size), one, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["relu", "identity", "silu", "sigmoid"])
def test_kernels_at_the_ends_of_float32_are_those_of_float64(activation, size):
    """SiLU is a ReLU from far away, and the identity (by half) from nearby, as is the sigmoid, which is flat from far away."""
    if activation == "sigmoid" and size > 1:
        return
    w = (PAIR[0] / np.float32(1.01 * np.abs(PAIR[0]).max()) * np.float64(size)).astype(np.float32)
    u, v = methods.factor("kernel_projection", jax.random.key(0), w, 3, activation=activation)
    limit = activation if activation in ("relu", "identity") else "relu" if size > 1 else "identity"
    wanted = reference.projected(w.astype(np.float64) / size, 3, limit)
    rounding = 1e-5 if limit == activation else 2e-3  # a section of a sigmoid, which is near a half, holds few digits
    np.testing.assert_allclose(np.asarray(u, np.float64) @ np.asarray(v, np.float64) / size, wanted, atol=rounding)
