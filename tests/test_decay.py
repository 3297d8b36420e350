import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lr
from lowrank_jax.kernel import LowRankKernel


def tree():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "dense": {"kernel": LowRankKernel(normal(7, 3), normal(3, 5))},
        "stacked": {"kernel": LowRankKernel(normal(2, 7, 3), normal(2, 3, 5))},
        "plain": {"kernel": normal(4, 4)},
    }


def updates_of(transform, params):
    """From updates of zero."""

    @jax.jit
    def update(params):
        return transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)[0]

    return update(params)


def product_penalty(params):
    """½ |UV|² with the product formed."""
    return 0.5 * sum(jnp.sum(params[name]["kernel"].merge() ** 2) for name in ("dense", "stacked"))


def test_the_penalty_and_its_gradient_are_those_of_the_product():
    params = tree()
    penalty, expected = jax.jit(jax.value_and_grad(lambda params: 0.3 * product_penalty(params)))(params)
    np.testing.assert_allclose(0.3 * jax.jit(lr.frobenius_penalty)(params), penalty, rtol=1e-6)
    updates = updates_of(lr.add_frobenius_decay(0.3), params)
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
    products = [params[name]["kernel"].u @ params[name]["kernel"].v for name in ("dense", "stacked")]
    nuclear = sum(np.linalg.svd(product, compute_uv=False).sum() for product in products)
    assert jax.jit(lr.nuclear_penalty)(params) > nuclear
    u, v = (np.asarray(factor) for factor in lr.projection.spectral(products[0], 3))
    balanced = {"dense": {"kernel": LowRankKernel(u, v)}}
    exact = np.linalg.svd(u @ v, compute_uv=False).sum()
    np.testing.assert_allclose(lr.nuclear_penalty(balanced), exact, rtol=1e-5)


def test_nuclear_decay_is_the_gradient_of_its_penalty():
    params = tree()
    updates = updates_of(lr.add_nuclear_decay(0.3), params)
    expected = jax.jit(jax.grad(lambda params: 0.3 * lr.nuclear_penalty(params)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize("penalty", [lr.frobenius_penalty, lr.nuclear_penalty])
def test_penalties_of_16_bit_factors_are_summed_in_float32_and_gradients_keep_their_dtype(dtype, penalty):
    u, v = (np.random.default_rng(i).uniform(2, 3, shape) for i, shape in enumerate([(300, 4), (4, 300)]))
    params = {"kernel": LowRankKernel(jnp.asarray(u / 20, dtype), jnp.asarray(20 * v, dtype))}  # |V|² is above 65,504
    u, v = (np.asarray(factor, np.float64) for factor in (params["kernel"].u, params["kernel"].v))
    if penalty is lr.frobenius_penalty:
        wanted, *slopes = np.sum((u @ v) ** 2) / 2, u @ (v @ v.T), (u.T @ u) @ v
    else:
        wanted, *slopes = (np.sum(u**2) + np.sum(v**2)) / 2, u, v
    factor = 1e-5
    value, grads = jax.value_and_grad(lambda params: factor * penalty(params))(params)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, factor * wanted, rtol=1e-5)
    for grad, slope in zip((grads["kernel"].u, grads["kernel"].v), slopes, strict=True):
        assert grad.dtype == dtype
        # A half of the last of 11 or 8 digits; float16 has steps of 6e-8 near zero.
        np.testing.assert_allclose(np.asarray(grad, np.float64), factor * slope, rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_decay_of_16_bit_factors_is_finite_and_keeps_the_updates_dtype(dtype):
    u, v = (np.random.default_rng(i).uniform(20, 30, shape) for i, shape in enumerate([(50, 2), (2, 50)]))
    params = {"kernel": LowRankKernel(jnp.asarray(u, dtype), jnp.asarray(v, dtype))}
    u, v = (np.asarray(factor, np.float64) for factor in (params["kernel"].u, params["kernel"].v))
    updates = updates_of(lr.add_frobenius_decay(1e-3), params)["kernel"]
    assert updates.u.dtype == updates.v.dtype == dtype
    np.testing.assert_allclose(np.asarray(updates.u, np.float64), 1e-3 * u @ (v @ v.T), rtol=5e-3)
    np.testing.assert_allclose(np.asarray(updates.v, np.float64), 1e-3 * (u.T @ u) @ v, rtol=5e-3)


def test_a_mask_by_path_leaves_the_other_pairs_alone():
    def pair(seed):
        return LowRankKernel(*(jax.random.normal(jax.random.key(seed + i), shape) for i, shape in enumerate([(6, 2), (2, 5)])))

    params = {"one": {"kernel": pair(0)}, "other": {"kernel": pair(2)}}
    mask = jax.tree_util.tree_map_with_path(lambda path, leaf: "one" in str(path), params)
    updates = jax.tree.map(jnp.zeros_like, params)
    for decay in (lr.add_frobenius_decay(0.1), lr.add_nuclear_decay(0.1)):
        masked = optax.masked(decay, mask)
        found, _ = masked.update(updates, masked.init(params), params)
        alone, _ = decay.update({"one": updates["one"]}, decay.init({"one": params["one"]}), {"one": params["one"]})
        assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), found["one"], alone["one"]))
        assert not any(leaf.any() for leaf in jax.tree.leaves(found["other"]))
    halves = jax.tree_util.tree_map_with_path(lambda path, leaf: jax.tree_util.keystr(path).endswith("u"), params)
    assert sum(jax.tree.leaves(halves)) == 2
    masked = optax.masked(lr.add_frobenius_decay(0.1), halves)
    with pytest.raises(ValueError, match="mask pairs as a whole"):
        masked.update(updates, masked.init(params), params)
