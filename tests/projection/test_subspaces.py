"""The search for a subspace against exhaustive ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import projection
from lowrank_jax.projection import activations, subspaces
from tests.projection import reference
from tests.projection.reference import golden_matrix, relative_risk

GOLDEN = {(12, 8): {1: 0.652598, 4: 0.283737}, (32, 48): {1: 0.818698, 2: 0.757338}}  # by shape and rank


@pytest.mark.parametrize("shape", GOLDEN)
def test_golden_relative_risks_of_the_best_subset(shape):
    w = golden_matrix(*shape).astype(np.float32)
    found = jax.jit(lambda w: [projection.kernel_projection(w, rank, subspace="search") for rank in GOLDEN[shape]])(w)
    np.testing.assert_allclose([relative_risk(w, factors) for factors in found], [*GOLDEN[shape].values()], atol=1e-5)


@pytest.mark.parametrize("shape", GOLDEN)
def test_exchanges_from_the_leading_vectors_suffice_for_them(monkeypatch, shape):
    monkeypatch.setattr(subspaces, "ENUMERATED", 0)
    _, s, bt = np.linalg.svd(golden_matrix(*shape), full_matrices=False)
    energy = np.float32((s[:, None] * bt) ** 2)
    length = np.sqrt(energy.sum(0))

    @jax.jit
    def search(energy):
        def loss(rho):
            return length**2 * (1 - activations.relu_h(rho) ** 2)

        return [subspaces.search(energy, length, rank, loss) for rank in GOLDEN[shape]]

    for (rank, best), chosen in zip(GOLDEN[shape].items(), search(energy), strict=True):
        assert chosen.shape == (rank,)
        h = reference.relu_h(np.minimum(np.sqrt(energy[chosen].sum(0)) / length, 1))
        np.testing.assert_allclose(1 - (length**2 * h**2).sum() / (length**2).sum(), best, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", pytest.param("tanh", marks=pytest.mark.slow)])
def test_search_finds_the_best_subset(activation):
    w = np.random.default_rng(3).standard_normal((6, 9)).astype(np.float32)
    q = np.linalg.svd(w, full_matrices=False)[0]
    subsets = np.stack([q[:, list(subset)] for subset in itertools.combinations(range(6), 3)])

    @jax.jit
    def risks(w):
        def lost(factors):
            return projection.relative_risk(w, factors[0] @ factors[1], activation=activation)

        every = jax.vmap(lambda q: lost(projection.on_subspace(w, q, activation=activation)))(subsets)
        return lost(projection.kernel_projection(w, 3, subspace="search", activation=activation)), every

    found, every = risks(w)
    np.testing.assert_allclose(found, every.min(), atol=2e-5)


def test_refine_ends_where_the_leading_eigenvectors_of_the_weighted_columns_are():
    """docs/mathematics.md, section 3.2: Q spans the leading eigenvectors of Σ a_j w_j w_jᵀ, a_j = h h' / rho."""
    w = np.random.default_rng(0).standard_normal((16, 16))
    with jax.enable_x64(True):
        u, _ = projection.kernel_projection(w, 2, subspace="refine")
    q = np.linalg.qr(u)[0]
    rho = np.linalg.norm(q.T @ w, axis=0) / np.linalg.norm(w, axis=0)
    weights = reference.relu_h(rho) * (np.pi - np.arccos(rho)) / np.pi / rho
    _, vectors = np.linalg.eigh((w * weights) @ w.T)
    np.testing.assert_allclose(np.linalg.svd(q.T @ vectors[:, -2:])[1], 1, atol=1e-4)


def test_golden_gain_over_the_singular_vectors():
    w = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)

    @jax.jit
    def made(w):
        projected = (projection.kernel_projection(w, 1, subspace=subspace) for subspace in ("search", "refine"))
        return [projection.spectral(w, 1), *projected]

    np.testing.assert_allclose([relative_risk(w, factors) for factors in made(w)], [0.7116, 0.6745, 0.6705], atol=1e-4)


def test_descent_is_monotone(monkeypatch):
    w = np.random.default_rng(1).standard_normal((24, 40)).astype(np.float32)
    length = np.linalg.norm(w, axis=0)

    def cosine(coordinates):
        return jnp.linalg.norm(coordinates, axis=0) / length

    def loss(rho):
        return length**2 * (1 - activations.relu_h(rho) ** 2)

    @jax.jit
    @jax.vmap
    def descend(steps):
        monkeypatch.setattr(subspaces, "_STEPS", steps)
        return subspaces.refine(w, jnp.eye(24, 3), cosine, loss)

    risks = []
    for basis in np.asarray(descend(np.array([0, 1, 2, 4, 8, 16, 64]))):
        np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)
        rho = np.linalg.norm(basis.T @ w, axis=0) / length
        risks.append(np.sum(length**2 * (1 - reference.relu_h(rho) ** 2)))
    assert (np.diff(risks) <= 1e-6 * risks[0]).all()
    assert risks[-1] < 0.9 * risks[0]


def test_a_table_reads_like_the_loss():
    length = np.float32([0.3, 1.0, 4.0])
    act = activations.get("silu")

    def loss(rho):
        return act.risk(length, act.best_length(length, rho), rho)

    rho = np.random.default_rng(0).uniform(0, 1, (200, 3)).astype(np.float32)
    rho[0], rho[1] = 0, 1
    exact = np.asarray(jax.jit(jax.vmap(loss))(rho))
    read = np.asarray(jax.jit(lambda rho: subspaces.tabulated(loss, 3, jnp.float32)(rho))(rho))
    np.testing.assert_allclose(read, exact, atol=1e-5 * exact[0].max())
    np.testing.assert_allclose(read[:2], exact[:2], atol=1e-6)


@pytest.mark.parametrize("activation", ["identity", pytest.param("tanh", marks=pytest.mark.slow)])
def test_exchanges_end_where_nothing_is_left_to_gain(activation):
    """Rank 5 of 8 wanted, out of more subsets than are enumerated: risks are rounding, some of them below zero."""
    project = jax.jit(jax.vmap(lambda w: projection.kernel_projection(w, 8, activation=activation, subspace="refine")))
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((20, 40, 5)) @ rng.standard_normal((20, 5, 40))).astype(np.float32)
    u, v = project(w)
    np.testing.assert_allclose(np.asarray(u) @ np.asarray(v), w, atol=2e-3)
