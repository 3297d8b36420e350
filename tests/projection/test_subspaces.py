"""The search for a subspace against exhaustive ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import activations, subspaces
from lowrank_jax.projection import matrix as projection
from tests.projection.test_matrix import golden_matrix, relative_risk

GOLDEN = [(12, 8, 1, 0.652598), (12, 8, 4, 0.283737), (32, 48, 1, 0.818698), (32, 48, 2, 0.757338)]


@pytest.mark.parametrize(("n", "m", "rank", "best"), GOLDEN)
def test_golden_relative_risks_of_the_best_subset(n, m, rank, best):
    w = jnp.asarray(golden_matrix(n, m), jnp.float32)
    np.testing.assert_allclose(relative_risk(w, projection.kernel_projection(w, rank, subspace="search")), best, atol=1e-5)


@pytest.mark.parametrize(("n", "m", "rank", "best"), GOLDEN)
def test_exchanges_from_the_leading_vectors_suffice_for_them(monkeypatch, n, m, rank, best):
    monkeypatch.setattr(subspaces, "ENUMERATED", 0)
    _, s, bt = np.linalg.svd(golden_matrix(n, m), full_matrices=False)
    energy = jnp.asarray((s[:, None] * bt) ** 2, jnp.float32)
    length = jnp.sqrt(energy.sum(0))
    chosen = subspaces.search(energy, length, rank, lambda rho: length**2 * (1 - activations.relu_h(rho) ** 2))
    assert chosen.shape == (rank,)
    h = activations.relu_h(jnp.sqrt(energy[chosen].sum(0)) / length)
    np.testing.assert_allclose(1 - (length**2 * h**2).sum() / (length**2).sum(), best, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_search_finds_the_best_subset(activation):
    w = jnp.asarray(np.random.default_rng(3).standard_normal((6, 9)), jnp.float32)
    q = np.linalg.svd(w, full_matrices=False)[0]
    subsets = [q[:, list(subset)] for subset in itertools.combinations(range(6), 3)]
    every = [relative_risk(w, projection.on_subspace(w, q, activation=activation), activation=activation) for q in subsets]
    found = projection.kernel_projection(w, 3, subspace="search", activation=activation)
    np.testing.assert_allclose(relative_risk(w, found, activation=activation), min(every), atol=2e-5)


def test_refine_ends_where_the_leading_eigenvectors_of_the_weighted_columns_are():
    """docs/mathematics.md, section 3.2: Q spans the leading eigenvectors of Σ a_j w_j w_jᵀ, a_j = h h' / rho."""
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(0).standard_normal((16, 16)))
        u, _ = projection.kernel_projection(w, 2, subspace="refine")
        q = jnp.linalg.qr(u)[0]
        rho = jnp.linalg.norm(q.T @ w, axis=0) / jnp.linalg.norm(w, axis=0)
        weights = activations.relu_h(rho) * (np.pi - jnp.arccos(rho)) / np.pi / rho
        _, vectors = jnp.linalg.eigh((w * weights) @ w.T)
        np.testing.assert_allclose(jnp.linalg.svd(q.T @ vectors[:, -2:])[1], 1, atol=1e-4)


def test_golden_gain_over_the_singular_vectors():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((16, 16)), jnp.float32)
    made = [projection.spectral(w, 1), *(projection.kernel_projection(w, 1, subspace=s) for s in ("search", "refine"))]
    np.testing.assert_allclose([relative_risk(w, factors) for factors in made], [0.7116, 0.6745, 0.6705], atol=1e-4)


def test_descent_is_monotone(monkeypatch):
    w = jnp.asarray(np.random.default_rng(1).standard_normal((24, 40)), jnp.float32)
    length = jnp.linalg.norm(w, axis=0)

    def cosine(coordinates):
        return jnp.linalg.norm(coordinates, axis=0) / length

    def loss(rho):
        return length**2 * (1 - activations.relu_h(rho) ** 2)

    risks = []
    for steps in (0, 1, 2, 4, 8, 16, 64):
        monkeypatch.setattr(subspaces, "_STEPS", steps)
        basis = subspaces.refine(w, jnp.eye(24, 3), cosine, loss)
        np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)
        risks.append(float(loss(cosine(basis.T @ w)).sum()))
    assert (np.diff(risks) <= 1e-6 * risks[0]).all()
    assert risks[-1] < 0.9 * risks[0]


def test_a_table_reads_like_the_loss():
    length = jnp.array([0.3, 1.0, 4.0])
    act = activations.get("silu")

    @jax.jit
    def loss(rho):
        return act.risk(length, act.best_length(length, rho), rho)

    read = subspaces.tabulated(loss, 3, jnp.float32)
    rho = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (200, 3)), jnp.float32)
    exact = jnp.stack([loss(row) for row in rho])
    np.testing.assert_allclose(read(rho), exact, atol=1e-5 * float(loss(jnp.zeros(3)).max()))
    np.testing.assert_allclose(read(jnp.array([[0.0] * 3, [1.0] * 3])), [loss(jnp.zeros(3)), loss(jnp.ones(3))], atol=1e-6)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_exchanges_end_where_nothing_is_left_to_gain(activation):
    """Rank 5 of 8 wanted, out of more subsets than are enumerated: risks are rounding, some of them below zero."""
    project = jax.jit(jax.vmap(lambda w: projection.kernel_projection(w, 8, activation=activation, subspace="refine")))
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((20, 40, 5)) @ rng.standard_normal((20, 5, 40)), jnp.float32)
    u, v = project(w)
    np.testing.assert_allclose(u @ v, w, atol=2e-3)
