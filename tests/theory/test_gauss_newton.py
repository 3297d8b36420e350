"""Gauss–Newton: its curvature against sampling and plain linear algebra, its gradient against autodiff, where it ends."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.theory import gauss_newton
from lowrank_jax.theory.gauss_newton import Fit, polish
from lowrank_jax.theory.samples import from_arrays

N, WIDTH, OUTPUTS = 8, 5, 3


def unit_columns(w):
    return w / np.linalg.norm(w, axis=0)


def draw(seed, count=20_000):
    """W with columns of length one, A, x and y."""
    rng = np.random.default_rng(seed)
    w, a = unit_columns(rng.standard_normal((N, WIDTH))), rng.standard_normal((WIDTH, OUTPUTS))
    x = rng.standard_normal((count, N))
    return w, a, x, np.maximum(x @ w, 0) @ a


@pytest.fixture(scope="module")
def drawn():
    return draw(0)


def expected(w):
    """The expected curvature in the inputs' own coordinates, for square W."""
    found = gauss_newton.expected_curvature(jnp.asarray(w))
    second = np.einsum("pa,ajbl,qb->pjql", found.basis, found.second, found.basis)
    return second, np.einsum("pa,ajl->pjl", found.basis, found.shared), found.outside


def test_curvatures_are_what_sampling_gives():
    rng = np.random.default_rng(0)
    r = unit_columns(rng.standard_normal((5, 5)))
    r[:, 2], r[:, 3] = r[:, 0], -r[:, 0]  # of one direction, and of opposite ones
    r[:, 4] = r[:, 1] + 0.05 * r[:, 4]  # close
    r = unit_columns(r)
    x = rng.standard_normal((40, 10_000, 5))
    on = (x @ r > 0).astype(float)
    weighted = on[..., :, None] * x[..., None, :]  # [part, sample, j, a]
    second = np.stack([np.einsum("sja,slb->ajbl", part, part) for part in weighted]) / x.shape[1]
    shared = np.einsum("psja,psl->pajl", weighted, np.maximum(x @ r, 0)) / x.shape[1]
    both = np.einsum("psj,psl->pjl", on, on) / x.shape[1]
    for found, parts in zip(expected(r), (second, shared, both), strict=True):
        error = parts.std(axis=0, ddof=1) / math.sqrt(len(parts))
        assert (abs(parts.mean(axis=0) - found) <= 5 * error + 1e-8).all()  # an angle of π keeps half the digits


def test_curvatures_at_right_angles_of_one_direction_and_of_opposite_ones():
    r = np.zeros((4, 4))
    r[0], r[1, 1] = [1, 0, 1, -1], 1
    second, shared, both = expected(r)
    np.testing.assert_allclose(second[:, 0, :, 2], np.eye(4) / 2, atol=1e-12)
    np.testing.assert_allclose(second[:, 0, :, 3], 0, atol=1e-12)
    crossed = np.zeros((4, 4))
    crossed[0, 1] = crossed[1, 0] = 1 / (2 * np.pi)
    np.testing.assert_allclose(second[:, 0, :, 1], np.eye(4) / 4 + crossed, atol=1e-12)
    np.testing.assert_allclose(
        both, [[1 / 2, 1 / 4, 1 / 2, 0], [1 / 4, 1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 2, 0], [0, 1 / 4, 0, 1 / 2]]
    )
    np.testing.assert_allclose(shared[0, 0], [1 / 2, 1 / (2 * np.pi), 1 / 2, 0], atol=1e-12)  # E [z > 0] z relu(r_l·x)


def test_gradients_are_those_of_the_squared_error(drawn):
    w, a, x, y = drawn
    rng = np.random.default_rng(1)
    w, a = w + 0.3 * rng.standard_normal(w.shape), a + 0.3 * rng.standard_normal(a.shape)
    x, y = x[:500], y[:500]
    error, gram, down_w, down_a = gauss_newton._gradients(x, y, w, a)
    np.testing.assert_allclose(error, np.sum((y - np.maximum(x @ w, 0) @ a) ** 2), rtol=1e-12)
    np.testing.assert_allclose(gram, np.maximum(x @ w, 0).T @ np.maximum(x @ w, 0), rtol=1e-10)
    gradients = jax.grad(gauss_newton.squared_error, argnums=(2, 3))(x, y, jnp.asarray(w), jnp.asarray(a))
    np.testing.assert_allclose(down_w, -gradients[0] / 2, rtol=1e-9)
    np.testing.assert_allclose(down_a, -gradients[1] / 2, rtol=1e-9)


def full_curvature(w, a):
    """Of all unknowns, W's `[n m]` and A's `[m outputs]`, over x ~ N(0, I); no basis, no elimination."""
    n, m = w.shape
    t = np.zeros((n, m, n, m))
    for j in range(m):
        for i in range(m):
            u, v = w[:, j] / np.linalg.norm(w[:, j]), w[:, i] / np.linalg.norm(w[:, i])
            if i == j:
                t[:, j, :, i] = np.eye(n) / 2
                continue
            angle = math.acos(u @ v)
            plane = np.outer(u, v) + np.outer(v, u) - math.cos(angle) * (np.outer(u, u) + np.outer(v, v))
            t[:, j, :, i] = ((math.pi - angle) * np.eye(n) + plane / math.sin(angle)) / (2 * math.pi)
    shared = np.einsum("ajbl,bl->ajl", t, w)
    gram = np.einsum("aj,ajl->jl", w, shared)
    size, outputs = w.size, a.shape[1]
    full = np.zeros((size + a.size, size + a.size))
    full[:size, :size] = np.einsum("ajbl,jk,lk->ajbl", t, a, a).reshape(size, size)
    full[:size, size:] = np.einsum("ajq,jk->ajqk", shared, a).reshape(size, -1)
    full[size:, :size] = full[:size, size:].T
    full[size:, size:] = np.einsum("jl,kp->jklp", gram, np.eye(outputs)).reshape(a.size, a.size)
    return full, gram


@pytest.mark.parametrize("shape", [(N, WIDTH, OUTPUTS), (4, 4, 1)])
def test_an_undamped_step_solves_for_all_unknowns_at_once(shape):
    n, m, outputs = shape
    rng = np.random.default_rng(2)
    w, a = unit_columns(rng.standard_normal((n, m))), rng.standard_normal((m, outputs))
    full, gram = full_curvature(w, a)
    # A gradient that some change of the unknowns explains: one along a neuron's growth has none.
    down = full @ (0.01 * rng.standard_normal(len(full)))
    down_w, down_a = down[: w.size].reshape(n, m), down[w.size :].reshape(m, outputs)
    across, block = full[: w.size, w.size :], full[w.size :, w.size :]
    eliminated = full[: w.size, : w.size] - across @ np.linalg.solve(block, across.T)
    right = down[: w.size] - across @ np.linalg.solve(block, down[w.size :])
    moved = np.linalg.pinv(eliminated, rcond=1e-10, hermitian=True) @ right
    fitted = np.linalg.solve(block, down[w.size :] - across.T @ moved)
    wanted_w, wanted_a = w + moved.reshape(n, m), a + fitted.reshape(m, outputs)
    length = np.linalg.norm(wanted_w, axis=0)
    fit = Fit(w, a, 0.0, gram, down_w, down_a)
    found_w, found_a = gauss_newton._step(fit, gauss_newton.expected_curvature(jnp.asarray(w)), 0.0)
    np.testing.assert_allclose(found_w, wanted_w / length, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found_a, wanted_a * length[:, None], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_from_near_the_truth_it_converges_to_it(seed):
    w, a, x, y = draw(seed)
    fit = polish(
        from_arrays(x, y), len(x), jnp.asarray(w + 0.1 * np.random.default_rng(seed).standard_normal(w.shape)), goal=0.0
    )
    assert fit.error < 1e-24 * np.mean(np.sum(y**2, axis=1))
    np.testing.assert_allclose(fit.w, w, atol=1e-11)
    np.testing.assert_allclose(fit.a, a, atol=1e-10)


def test_sampled_curvature_is_the_mean_over_the_samples(drawn):
    w, _, x, y = drawn
    x, y = x[:301], y[:301]
    found = gauss_newton.sampled_curvature(from_arrays(x, y), jnp.asarray(w))
    active = (x @ w > 0).astype(float)
    second = np.einsum("ia,ij,ib,il->ajbl", x, active, x, active, optimize=True) / len(x)
    shared = np.einsum("ia,ij,il->ajl", x, active, np.maximum(x @ w, 0)) / len(x)
    np.testing.assert_allclose(found.second, second, atol=1e-12)
    np.testing.assert_allclose(found.shared, shared, atol=1e-12)
    np.testing.assert_array_equal(found.basis, np.eye(N))


@pytest.mark.parametrize("seed", range(3))
def test_few_samples_take_their_own_curvature_and_reach_rounding(seed):
    count = gauss_newton._FEW * N * WIDTH - 1
    w, _, x, y = draw(seed, count)
    near = jnp.asarray(w + 0.05 * np.random.default_rng(seed).standard_normal(w.shape))
    fit = polish(from_arrays(x, y), count, near, goal=0.0)
    np.testing.assert_allclose(fit.w, w, atol=1e-11)


@pytest.fixture
def after(monkeypatch):
    """What is reached after so many steps."""

    def polished(steps, samples, w, goal=0.0):
        monkeypatch.setattr(gauss_newton, "_STEPS", steps)
        return polish(samples, 20_000, jnp.asarray(w), goal=goal)

    return polished


def test_the_error_never_rises(after, drawn):
    w, _, x, y = drawn
    samples, far = from_arrays(x, y), np.random.default_rng(3).standard_normal(w.shape)
    errors = [after(steps, samples, far).error for steps in range(15)]
    assert (np.diff(errors) <= 0).all()
    assert errors[-1] < errors[0] / 2


def test_a_step_reduces_the_error_by_what_the_curvature_is_off(after, drawn):
    """√(n m / N) = 0.045 in W, so 0.002 squared: a wrong curvature would need many more steps."""
    w, _, x, y = drawn
    samples, near = from_arrays(x, y), w + 0.01 * np.random.default_rng(4).standard_normal(w.shape)
    errors = [after(steps, samples, near).error for steps in range(5)]
    assert all(later < 0.02 * earlier for earlier, later in itertools.pairwise(errors))


def test_it_stops_at_its_goal(after, drawn):
    w, _, x, y = drawn
    samples, near = from_arrays(x, y), w + 0.01 * np.random.default_rng(4).standard_normal(w.shape)
    one, two = (after(steps, samples, near).error for steps in (1, 2))
    assert after(100, samples, near, goal=(one + two) / 2).error == two


def test_a_is_that_of_least_squares(after, drawn):
    w, _, x, y = drawn
    wrong = unit_columns(np.random.default_rng(5).standard_normal(w.shape))
    fit = after(0, from_arrays(x, y), 3 * wrong)
    np.testing.assert_allclose(fit.w, wrong, rtol=1e-12)
    np.testing.assert_allclose(fit.a, np.linalg.lstsq(np.maximum(x @ wrong, 0), y, rcond=None)[0], rtol=1e-8, atol=1e-10)
