"""Curves against the singular value decomposition in float64 and the dual activation, rank by rank."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import projection
from lowrank_jax.projection import activations
from lowrank_jax.projection.curves import curves, gaussian_curves


def kernel(n, m, seed=0, spread=1.0):
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(n, m)) * np.exp(spread * draw.normal(size=m))).astype(np.float32)


@functools.partial(jax.jit, static_argnames="act")
def risks(act, size, rho):
    """Of outputs `[outputs]`: of nothing, of an output of the same length, of the best one, and of that length at a cosine."""
    nothing = jnp.zeros_like(size)
    best = act.risk(size, act.best_length(size, rho), rho)
    return act.risk(size, nothing, nothing), act.risk(size, size, nothing), best, act.risk(size, size, rho)


def directly(w, activation, group, normalized):
    """By LAPACK's decomposition, and the risks of every output at every rank."""
    _, s, bt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    energy = ((s[:, None] * bt) ** 2).reshape(len(s), group, -1).sum(axis=1)
    rho = np.sqrt(np.minimum(np.cumsum(energy, axis=0) / energy.sum(axis=0), 1)).astype(np.float32)
    size = np.sqrt(energy.sum(axis=0)).astype(np.float32)
    if normalized is not None:
        size = np.ones_like(size) if normalized == "each" else size / np.sqrt((size**2).mean())
    padding = (0, MOST - rho.size)  # to one shape, which is compiled once
    sizes, cosines = np.pad(np.broadcast_to(size, rho.shape).ravel(), padding, "edge"), np.pad(rho.ravel(), padding)
    whole, variance, best, same = (
        np.asarray(part, np.float64)[: rho.size].reshape(rho.shape)
        for part in risks(activations.get(activation), sizes, cosines)
    )
    kept = 1 - same / variance
    return best.sum(axis=1) / whole[0].sum(), (kept**2 * variance).sum(axis=1) / variance[0].sum()


MOST = 7 * 12  # outputs times ranks
SHAPES = ((12, 7, 1), (7, 12, 1), (9, 12, 3))


@pytest.mark.parametrize("activation", ["relu", "identity", "leaky_relu", "silu", "tanh"])
def test_every_rank_is_what_its_projection_loses(activation):
    atol = 1e-5 if activation in ("relu", "identity", "leaky_relu") else 2e-3  # read linearly off a table
    for normalized, (n, m, group) in itertools.product((None, "each", "together"), SHAPES):
        w = kernel(n, m)
        found = curves(w, activation=activation, group=group, normalized=normalized)
        lost, kept = directly(w, activation, group, normalized)
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
    for activation in ("relu", "silu"):
        found = curves(kernel(40, 40), activation=activation)
        assert (np.diff(found.risk) <= 1e-6).all() and (np.diff(found.correlation) >= -1e-6).all()
        assert abs(found.risk[-1]) < 1e-5 and abs(found.correlation[-1] - 1) < 1e-5


@pytest.mark.parametrize("normalized", [None, "each", "together"])
@pytest.mark.parametrize(("n", "m", "group"), [(24, 40, 1), (96, 64, 1), (64, 96, 1), (64, 64, 1), (48, 96, 3)])
def test_gaussian_curves_are_those_of_drawn_kernels(n, m, group, normalized):
    """Within twice what single draws differ by, and what a large matrix's largest singular value is off by."""
    drawn = [
        curves(np.random.default_rng(seed).normal(size=(n, m)) / np.sqrt(n * group), group=group, normalized=normalized)
        for seed in range(12)
    ]
    found = gaussian_curves(n, m, group=group, normalized=normalized)
    assert found.energy[-1] == pytest.approx(1) and found.risk[-1] == pytest.approx(0, abs=1e-6)
    for name in found._fields:
        values = np.array([getattr(one, name) for one in drawn])
        assert (np.abs(getattr(found, name) - values.mean(axis=0)) <= 2 * values.std(axis=0) + 0.004).all()


def test_gaussian_outputs_have_length_one():
    """So that activations find them where those of a fresh layer are: at other lengths a steep one loses other shares."""
    for n, m, group in ((48, 80, 1), (80, 48, 1), (48, 96, 2)):
        w = np.random.default_rng(0).normal(size=(n, m)) / np.sqrt(n * group)
        drawn, longer = (curves(scale * w, activation="tanh", group=group).risk for scale in (1, 2))
        found = gaussian_curves(n, m, activation="tanh", group=group).risk
        assert np.abs(found - drawn).max() < 0.015 and np.abs(found - longer).max() > 0.03


def test_a_shape_compiles_nothing(caplog):
    gaussian_curves(12, 7, activation="silu")
    with jax.log_compiles(), caplog.at_level("WARNING"):
        gaussian_curves(33, 21, activation="silu")
    assert not [record for record in caplog.records if "ompil" in record.message]


def test_traced_kernels_are_refused_and_constants_are_known():
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda w: curves(w).risk)(kernel(4, 3))
    found = []
    jax.jit(lambda x: found.append(curves(kernel(4, 3), activation="silu")) or x)(1.0)
    np.testing.assert_array_equal(found[0].risk, curves(kernel(4, 3), activation="silu").risk)


def test_zero_outputs_do_not_count_and_a_zero_kernel_loses_nothing():
    w = kernel(12, 7)
    padded = np.concatenate([w, np.zeros((12, 3), np.float32)], axis=1)
    for normalized in (None, "each", "together"):
        np.testing.assert_allclose(
            curves(padded, normalized=normalized).risk[:7], curves(w, normalized=normalized).risk, atol=1e-5
        )
    assert (np.asarray(curves(np.zeros((4, 3), np.float32)).risk) == 0).all()


def with_dead(n, m, dead=0.0):
    w = kernel(n, m, spread=0.3)
    w[:, ::3] *= dead
    return w, w[:, [j for j in range(m) if j % 3]]


@pytest.mark.parametrize(("n", "m"), [(60, 20), (20, 60), (15, 20)])
@pytest.mark.parametrize("dead", [0.0, 1e-20])
def test_dead_outputs_can_be_anywhere_or_nowhere(n, m, dead):
    w, alive = with_dead(n, m, dead)
    for normalized in (None, "each", "together"):
        found = curves(w, normalized=normalized)
        permuted = curves(w[:, np.random.default_rng(1).permutation(m)], normalized=normalized)
        without = curves(alive, normalized=normalized)
        for name in found._fields:
            values, full = getattr(found, name), min(alive.shape)
            np.testing.assert_allclose(getattr(permuted, name), values, atol=1e-6)
            np.testing.assert_allclose(values[:full], getattr(without, name), atol=1e-6)
            np.testing.assert_allclose(values[full:], getattr(without, name)[-1], atol=1e-6)


@pytest.mark.parametrize(("n", "m", "group"), [(60, 20, 1), (20, 30, 1), (60, 40, 2)])
@pytest.mark.parametrize("scales", [(1e-8,), (1e-12,), (1e-4, 1e-8, 1e-12)])
def test_small_outputs_are_those_of_a_singular_value_decomposition(n, m, group, scales):
    w = np.random.default_rng(0).normal(size=(n, m))
    outputs = w.reshape(n, group, -1)
    for place, scale in enumerate(scales):
        outputs[:, :, place :: len(scales) + 1] *= scale
    u, _, _ = np.linalg.svd(w, full_matrices=False)
    energy = ((u.T @ w) ** 2).reshape(min(n, m), group, -1).sum(axis=1)
    rho2 = np.minimum(np.cumsum(energy, axis=0) / energy.sum(axis=0), 1)
    # Of identity outputs the risk is 1 - ρ², and the correlation ρ.
    found = curves(w, activation="identity", group=group, normalized="each")
    np.testing.assert_allclose(found.risk, 1 - rho2.mean(axis=1), atol=1e-3)
    np.testing.assert_allclose(found.correlation, rho2.mean(axis=1), atol=1e-3)
    order = np.random.default_rng(1).permutation(outputs.shape[2])
    permuted = curves(outputs[:, :, order].reshape(n, m), activation="identity", group=group, normalized="each")
    np.testing.assert_allclose(permuted.risk, found.risk, atol=1e-3)


def test_sizes_near_the_ends_of_float32_change_nothing():
    w = kernel(12, 7, spread=0.3)
    for scale in (1e-30, 1e30):
        np.testing.assert_allclose(curves(w * np.float32(scale)).risk, curves(w).risk, atol=1e-5)


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((2, 0)), np.full((2, 2), np.nan)])
def test_what_is_no_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="matri"):
        curves(bad.astype(np.float32))
