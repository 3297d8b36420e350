"""The projection against golden values, sampling, float64 and its own optimality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax import projection


def golden_matrix(n, m):
    i, j = np.meshgrid(np.arange(n), np.arange(m), indexing="ij")
    return np.sin(1 + i * j + 0.37 * i + 0.91 * j) * (1 + j / m)


KINDS = ("gaussian", "deficient", "zero columns")


@st.composite
def matrices(draw, kinds=(*KINDS, "repeated singular values")):
    """Matrices and ranks: wide, tall, one row, one column, and the kinds above; few shapes, as each one is compiled."""
    n, m = draw(st.sampled_from([(1, 7), (7, 1), (5, 9), (9, 5), (8, 8)]))
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    w = rng.standard_normal((n, m))
    if kind == "deficient":
        w = rng.standard_normal((n, 1)) @ rng.standard_normal((1, m))
    elif kind == "zero columns":
        w[:, ::2] = 0
    elif kind == "repeated singular values":
        w = np.linalg.qr(rng.standard_normal((max(n, m), max(n, m))))[0][:n, :m]
    return jnp.asarray(w, jnp.float32), draw(st.sampled_from(sorted({1, (1 + min(n, m)) // 2, min(n, m)})))


def relative_risk(w, factors, **settings):
    u, v = factors
    return float(projection.risk(w, u @ v, **settings) / projection.risk(w, 0 * w, **settings))


@pytest.mark.parametrize(
    ("n", "m", "rank", "spectral", "top"),
    [
        (12, 8, 1, 0.696477, 0.652598),
        (12, 8, 2, 0.546249, 0.520122),
        (12, 8, 4, 0.299001, 0.283737),
        (32, 48, 1, 0.885527, 0.819095),
        (32, 48, 2, 0.812619, 0.761565),
    ],
)
def test_golden_relative_risks(n, m, rank, spectral, top):
    w = jnp.asarray(golden_matrix(n, m), jnp.float32)
    np.testing.assert_allclose(relative_risk(w, projection.spectral(w, rank)), spectral, atol=1e-5)
    np.testing.assert_allclose(relative_risk(w, projection.kernel_projection(w, rank)), top, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
def test_risk_is_what_sampling_gives(group):
    rng = np.random.default_rng(0)
    n, outputs = 6, 4
    w, y = rng.standard_normal((2, n, group * outputs))
    x = rng.standard_normal((200_000, group, n))

    def outputs_of(kernel):
        return np.maximum(np.einsum("bgn,ngo->bo", x, kernel.reshape(n, group, outputs)), 0)

    losses = ((outputs_of(w) - outputs_of(y)) ** 2).sum(-1)
    error = losses.std() / np.sqrt(len(losses))
    exact = float(projection.risk(jnp.asarray(w, jnp.float32), jnp.asarray(y, jnp.float32), group=group))
    assert abs(losses.mean() - exact) < 4 * error


@given(matrices())
def test_the_projection_never_loses_to_spectral(case):
    w, rank = case
    u, v = projection.kernel_projection(w, rank)
    a, b = projection.spectral(w, rank)
    assert projection.risk(w, u @ v) <= projection.risk(w, a @ b) + 1e-5 * projection.risk(w, 0 * w)


@given(matrices(), st.floats(0.5, 1.5))
def test_no_other_length_of_a_column_does_better(case, factor):
    w, rank = case
    u, v = projection.kernel_projection(w, rank)
    y = u @ v
    assert projection.risk(w, y) <= projection.risk(w, factor * y) + 1e-5 * projection.risk(w, 0 * w)


@given(matrices())
def test_factors_are_balanced(case):
    w, rank = case
    for u, v in (projection.spectral(w, rank), projection.kernel_projection(w, rank)):
        np.testing.assert_allclose(u.T @ u, v @ v.T, atol=2e-5 * (1 + float(jnp.abs(v).max()) ** 2))


@given(matrices())
def test_full_rank_changes_nothing(case):
    w, _ = case
    for factors in (projection.spectral(w, min(w.shape)), projection.kernel_projection(w, min(w.shape))):
        np.testing.assert_allclose(factors[0] @ factors[1], w, atol=2e-5)


@given(matrices(KINDS))  # where singular values repeat, the leading subspace is anybody's choice
def test_float32_agrees_with_float64(case):
    w, rank = case
    narrow = relative_risk(w, projection.kernel_projection(w, rank)) if np.any(w) else 0.0
    with jax.enable_x64(True):
        wide_w = jnp.asarray(np.asarray(w, np.float64))
        wide = relative_risk(wide_w, projection.kernel_projection(wide_w, rank)) if np.any(w) else 0.0
    np.testing.assert_allclose(narrow, wide, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18])
def test_the_size_of_a_kernel_does_not_matter(size):
    w = jnp.asarray(golden_matrix(9, 12), jnp.float32)
    (u, v), (a, b) = projection.kernel_projection(w, 2), projection.kernel_projection(size * w, 2)
    np.testing.assert_allclose((a / np.sqrt(size)) @ (b / np.sqrt(size)), u @ v, atol=1e-5)
    if size == 1e18:  # a risk is of the square of that size
        np.testing.assert_allclose(projection.risk(size * w, 0 * w) / size / size, projection.risk(w, 0 * w), rtol=1e-5)


def test_zero_columns_stay_zero():
    w = jnp.asarray(golden_matrix(8, 6), jnp.float32).at[:, 2].set(0)
    u, v = projection.kernel_projection(w, 2)
    np.testing.assert_allclose((u @ v)[:, 2], 0, atol=1e-6)


def test_identity_activation_makes_the_projection_spectral():
    w = jnp.asarray(golden_matrix(10, 14), jnp.float32)
    u, v = projection.kernel_projection(w, 3, activation="identity")
    a, b = projection.spectral(w, 3)
    np.testing.assert_allclose(u @ v, a @ b, atol=1e-5)
    difference = projection.risk(w, u @ v, activation="identity")
    np.testing.assert_allclose(difference, jnp.sum((w - u @ v) ** 2), rtol=1e-5)


def test_a_group_shares_one_scale():
    w = jnp.asarray(golden_matrix(12, 3 * 5), jnp.float32)
    u, v = projection.kernel_projection(w, 2, group=3)
    a, b = projection.spectral(w, 2)
    scale = (u @ v) / (a @ b)
    np.testing.assert_allclose(scale[0].reshape(3, 5), np.tile(scale[0, :5], (3, 1)), rtol=1e-4)
    assert relative_risk(w, (u, v), group=3) < relative_risk(w, (a, b), group=3)


def test_it_jits_vmaps_and_differentiates():
    w = jnp.asarray(np.stack([golden_matrix(8, 6), golden_matrix(8, 6) ** 2]), jnp.float32)
    u, v = jax.jit(jax.vmap(lambda w: projection.kernel_projection(w, 2)))(w)
    assert (u.shape, v.shape) == ((2, 8, 2), (2, 2, 6))
    with jax.enable_x64(True):
        a, b = (jnp.asarray(np.asarray(part, np.float64)) for part in w)
        grad = jax.grad(lambda y: projection.risk(a, y))(b)
        up, down = (projection.risk(a, b.at[0, 0].add(step)) for step in (1e-6, -1e-6))
        np.testing.assert_allclose(grad[0, 0], (up - down) / 2e-6, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda y: projection.risk(w[0], y))(w[0])).all()
    assert np.isfinite(jax.grad(lambda y: projection.risk(w[0], y))(0 * w[0])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: projection.spectral(w, 0), "rank 0 of a 4x6 matrix: must be a whole number from 1 to 4"),
        (lambda w: projection.kernel_projection(w, 5), "rank 5 of a 4x6 matrix"),
        (lambda w: projection.spectral(w[0], 1), r"expected a matrix \[n, m\], got shape \[6\]"),
        (lambda w: projection.spectral(w.astype(jnp.int32), 1), "real numbers"),
        (lambda w: projection.kernel_projection(w, 1, subspace="tpo"), "unknown subspace 'tpo'; did you mean top"),
        (lambda w: projection.kernel_projection(w, 1, activation="x"), "unknown activation 'x'"),
        (lambda w: projection.kernel_projection(w, 1, group=4), "group 4 does not divide the 6 columns"),
        (lambda w: projection.risk(w, w.T), "must have one shape"),
        (lambda w: projection.spectral(w, 1.5), "rank 1.5 of a 4x6 matrix"),
        (lambda w: projection.spectral([[1.0]], 1), "expected a matrix"),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 6)))
