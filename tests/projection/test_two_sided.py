"""Against the metric itself, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import projection
from lowrank_jax.projection import linalg, methods
from lowrank_jax.projection.two_sided import divergences
from tests.projection.reference import normal

RIDGE = linalg.RIDGE


def moment(seed, n, samples=60):
    x = np.asarray(normal(seed, samples, n), np.float64) * np.geomspace(0.1, 3, n)
    return x.T @ x / samples


def ridged(s):
    return s + RIDGE * np.diag(np.diag(s))


def lost(w, y, c, g):
    e = np.asarray(w, np.float64) - np.asarray(y, np.float64)
    return 0.5 * np.trace(e.T @ c @ e @ g)


def roots_of(c):
    values, vectors = np.linalg.eigh(c)
    return (vectors * np.sqrt(values)) @ vectors.T


def best(w, c, g, rank):
    """By symmetric roots and LAPACK, another way to the same matrix."""
    left, right = roots_of(c), roots_of(g)
    a, s, b = np.linalg.svd(left @ w @ right)
    return np.linalg.solve(left, (a[:, :rank] * s[:rank]) @ b[:rank]) @ np.linalg.inv(right), 0.5 * (s[rank:] ** 2).sum()


@pytest.mark.parametrize(("n", "m", "group"), [(12, 20, 1), (20, 12, 1), (12, 20, 2), (15, 15, 3)])
def test_it_is_the_best_matrix_of_its_rank_in_the_metric(n, m, group):
    w, c, g = np.asarray(normal(0, n, m), np.float64), moment(1, n), moment(2, m // group)
    whole = np.kron(np.eye(group), ridged(g))  # column j belongs to output j % (m // group)
    for rank in (1, 4, 9):
        u, v = projection.two_sided(jnp.float32(w), rank, rows=jnp.float32(c), columns=jnp.float32(g), group=group)
        assert u.shape == (n, rank) and v.shape == (rank, m)
        np.testing.assert_allclose(u.T @ u, v @ v.T, atol=2e-5 * np.abs(u.T @ u).max())
        expected, least = best(w, ridged(c), whole, rank)
        np.testing.assert_allclose(u @ v, expected, atol=3e-4 * np.abs(expected).max())
        assert lost(w, u @ v, ridged(c), whole) == pytest.approx(least, rel=1e-4)


def test_of_isotropic_inputs_and_gradients_it_is_the_spectral_one():
    w = normal(3, 10, 14)
    u, v = projection.two_sided(w, 4, rows=np.eye(10, dtype=np.float32), columns=np.eye(14, dtype=np.float32))
    a, b = projection.spectral(w, 4)
    np.testing.assert_allclose(u @ v, a @ b, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
def test_divergences_are_what_each_rank_loses(group):
    w, c, g = np.asarray(normal(4, 9, 12), np.float64), moment(5, 9), moment(6, 12 // group)
    r, t = np.linalg.cholesky(ridged(c)).T, np.linalg.cholesky(ridged(g)).T
    whole = np.kron(np.eye(group), ridged(g))
    curve = divergences(r @ w, t)
    assert curve[-1] == 0 and len(curve) == 9 and (np.diff(curve) <= 0).all()
    for rank in range(1, 9):
        assert curve[rank - 1] == pytest.approx(best(w, ridged(c), whole, rank)[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_size_of_gradients_does_not_matter(scale):
    w, c, g = normal(7, 8, 8), np.float32(moment(8, 8)), np.float32(moment(9, 8))
    u, v = projection.two_sided(w, 3, rows=c, columns=g)
    a, b = projection.two_sided(w, 3, rows=c, columns=g * np.float32(scale))
    np.testing.assert_allclose(u @ v, a @ b, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.eye(5)}, r"rows must have shape \[8, 8\]"),
        ({"columns": np.eye(8)}, r"columns must have shape \[6, 6\]"),
        ({"rank": 9}, "rank 9"),
        ({"group": 5}, "group 5"),
        ({"rows": np.full((8, 8), np.nan)}, "non-finite"),
    ],
)
def test_bad_input_gets_one_clear_error(changes, message):
    given = {"rank": 2, "rows": np.eye(8), "columns": np.eye(6), "group": 2, **changes}
    with pytest.raises(ValueError, match=message):
        projection.two_sided(normal(0, 8, 12), **given)


def test_a_matrix_alone_is_not_enough():
    with pytest.raises(ValueError, match=r"needs moments of inputs and gradients besides: projection\.two_sided"):
        methods.factor("two_sided", None, normal(0, 8, 12), 2)
