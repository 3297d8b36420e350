"""Curves against the singular value decomposition in float64 and the dual activation, rank by rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import projection
from lowrank_jax.projection import activations
from lowrank_jax.projection.curves import curves, curves_of_stacks
from lowrank_jax.projection.stack import Stack


def kernel(n, m, seed=0, spread=1.0):
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(n, m)) * np.exp(spread * draw.normal(size=m))).astype(np.float32)


def directly(w, activation, group, normalized):
    """By LAPACK's decomposition, and the risks of every output at every rank."""
    act = activations.get(activation)
    _, s, bt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    energy = ((s[:, None] * bt) ** 2).reshape(len(s), group, -1).sum(axis=1)
    rho = np.sqrt(np.minimum(np.cumsum(energy, axis=0) / energy.sum(axis=0), 1)).astype(np.float32)
    size = np.sqrt(energy.sum(axis=0)).astype(np.float32)
    if normalized is not None:
        size = np.ones_like(size) if normalized == "each" else size / np.sqrt((size**2).mean())
    sizes, nothing = np.broadcast_to(size, rho.shape), np.zeros_like(size)
    lost = act.risk(sizes, act.best_length(sizes, rho), rho).sum(axis=1) / act.risk(size, nothing, nothing).sum()
    variance = act.risk(size, size, nothing)
    kept = 1 - act.risk(sizes, sizes, rho) / variance
    return lost, (kept**2 * variance).sum(axis=1) / variance.sum()


@pytest.mark.parametrize("normalized", [None, "each", "together"])
@pytest.mark.parametrize("activation", ["relu", "identity", "leaky_relu", "silu", "tanh"])
def test_every_rank_is_what_its_projection_loses(activation, normalized):
    for n, m, group in ((12, 7, 1), (7, 12, 1), (9, 12, 3)):
        w = kernel(n, m)
        found = curves(w, activation=activation, group=group, normalized=normalized)
        lost, kept = directly(w, activation, group, normalized)
        atol = 1e-5 if activation in ("relu", "identity", "leaky_relu") else 2e-3  # read linearly off a table
        np.testing.assert_allclose(found.risk, lost, atol=atol)
        np.testing.assert_allclose(found.correlation, kept, atol=atol)


def test_it_is_the_risk_of_the_projection_and_the_correlation_that_samples_have():
    w = kernel(24, 16)
    found = curves(w)
    u, v = projection.kernel_projection(w, 5)
    np.testing.assert_allclose(found.risk[4], projection.relative_risk(w, u @ v), atol=1e-5)
    x = np.random.default_rng(1).normal(size=(200_000, 24)).astype(np.float32)
    one, other = np.maximum(x @ w, 0), np.maximum(x @ np.asarray(u @ v), 0)
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    cosine = (one * other).sum(axis=0) / np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))
    expected = (cosine**2 * one.var(axis=0)).sum() / one.var(axis=0).sum()
    np.testing.assert_allclose(found.correlation[4], expected, atol=0.01)  # of chance in 200,000 samples, and their tails


def test_risks_fall_and_correlations_rise_to_the_whole():
    for activation in ("relu", "gelu"):
        found = curves(kernel(40, 40), activation=activation)
        assert (np.diff(found.risk) <= 1e-6).all() and (np.diff(found.correlation) >= -1e-6).all()
        assert abs(found.risk[-1]) < 1e-5 and abs(found.correlation[-1] - 1) < 1e-5


def test_many_shapes_together_are_what_they_are_alone():
    settings = [
        (12, 7, "relu", 1, None),
        (30, 20, "silu", 1, "together"),
        (8, 24, "relu", 3, "each"),
        (7, 12, "identity", 1, None),
    ]
    stacks = [
        Stack(None, jnp.stack([kernel(n, m, seed) for seed in range(2)]), 1, act, group) for n, m, act, group, _ in settings
    ]
    together = jax.jit(lambda: curves_of_stacks(stacks, [normalized for *_, normalized in settings]))()
    for found, stack, (*_, act, group, normalized) in zip(together, stacks, settings, strict=True):
        for i in range(2):
            alone = curves(stack.w[i], activation=act, group=group, normalized=normalized)
            np.testing.assert_allclose(found.risk[i], alone.risk, atol=1e-4)
            np.testing.assert_allclose(found.correlation[i], alone.correlation, atol=1e-4)


def test_zero_outputs_do_not_count_and_a_zero_kernel_loses_nothing():
    w = kernel(12, 7)
    padded = np.concatenate([w, np.zeros((12, 3), np.float32)], axis=1)
    for normalized in (None, "each", "together"):
        np.testing.assert_allclose(
            curves(padded, normalized=normalized).risk[:7], curves(w, normalized=normalized).risk, atol=1e-5
        )
    assert (np.asarray(curves(np.zeros((4, 3), np.float32)).risk) == 0).all()


def test_sizes_near_the_ends_of_float32_change_nothing():
    w = kernel(12, 7, spread=0.3)
    for scale in (1e-30, 1e30):
        np.testing.assert_allclose(curves(w * np.float32(scale)).risk, curves(w).risk, atol=1e-5)


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((2, 0)), np.full((2, 2), np.nan)])
def test_what_is_no_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="matri"):
        curves(bad.astype(np.float32))
