import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_method_gives_finite_factors_in_the_kernels_dtype(method, dtype):
    w = jax.random.normal(jax.random.key(0), (12, 20), dtype)
    u, v = METHODS[method](jax.random.key(1), w, 3, activation="relu", group=2)
    assert (u.shape, v.shape) == ((12, 3), (3, 20))
    assert u.dtype == v.dtype == dtype
    assert np.isfinite(np.asarray(u, np.float32)).all() and np.isfinite(np.asarray(v, np.float32)).all()


@pytest.mark.parametrize("rank", [1, 8])
def test_random_factors_keep_the_variance_of_the_product(rank):
    w = 0.3 * jax.random.normal(jax.random.key(0), (400, 500))
    products = [u @ v for u, v in (METHODS["random"](jax.random.key(k), w, rank, activation="relu", group=1) for k in range(8))]
    # A product of r terms has heavy tails: its mean square varies by about sqrt(2 / (n r)) + sqrt(2 / (m r)) a draw.
    np.testing.assert_allclose(np.mean(np.square(products)), 0.09, rtol=0.1)


def test_random_factors_are_decided_by_the_key():
    w = jnp.ones((4, 5))
    first, again, other = (METHODS["random"](jax.random.key(k), w, 2, activation="relu", group=1)[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
