import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.kernel import LowRankKernel


def tree():
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "dense": {"kernel": LowRankKernel(jax.random.normal(keys[0], (7, 3)), jax.random.normal(keys[1], (3, 5)))},
        "stacked": {"kernel": LowRankKernel(jax.random.normal(keys[2], (2, 7, 3)), jax.random.normal(keys[3], (2, 3, 5)))},
        "plain": {"kernel": jax.random.normal(keys[4], (4, 4))},
    }


def product_penalty(params):
    """½ |UV|² with the product formed."""
    return 0.5 * sum(jnp.sum(params[name]["kernel"].merge() ** 2) for name in ("dense", "stacked"))


def test_the_penalty_and_its_gradient_are_those_of_the_product():
    params = tree()
    np.testing.assert_allclose(lr.frobenius_penalty(params), product_penalty(params), rtol=1e-6)
    transform = lr.add_frobenius_decay(0.3)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    expected = jax.tree.map(lambda g: 0.3 * g, jax.grad(product_penalty)(params))
    for ours, autodiff in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, autodiff, rtol=1e-6, atol=1e-6 * np.abs(autodiff).max())


def test_the_product_is_never_formed():
    n, m, rank = 301, 307, 2
    params = LowRankKernel(jnp.ones((n, rank)), jnp.ones((rank, m)))
    transform = lr.add_frobenius_decay(1.0)
    jaxpr = jax.make_jaxpr(lambda p: transform.update(p, transform.init(p), p)[0])(params)
    assert f"{n},{m}" not in str(jaxpr)


def test_it_needs_the_parameters():
    transform = lr.add_frobenius_decay(1.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        transform.update(tree(), transform.init(tree()))


def test_the_nuclear_surrogate_is_the_nuclear_norm_of_balanced_factors_and_above_it_elsewhere():
    params = tree()
    nuclear = sum(np.linalg.svd(params[name]["kernel"].merge(), compute_uv=False).sum() for name in ("dense", "stacked"))
    assert lr.nuclear_penalty(params) > nuclear
    u, v = lr.projection.spectral(params["dense"]["kernel"].merge(), 3)
    balanced = {"dense": {"kernel": LowRankKernel(u, v)}}
    exact = np.linalg.svd(u @ v, compute_uv=False).sum()
    np.testing.assert_allclose(lr.nuclear_penalty(balanced), exact, rtol=1e-5)


def test_nuclear_decay_is_the_gradient_of_its_penalty():
    params = tree()
    transform = lr.add_nuclear_decay(0.3)
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    expected = jax.tree.map(lambda g: 0.3 * g, jax.grad(lr.nuclear_penalty)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
