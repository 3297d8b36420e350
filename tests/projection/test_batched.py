import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.projection import batched, methods, padding
from lowrank_jax.projection.stack import Stack
from tests.projection import reference

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# By rank, group and activation; wide and tall, deficient and zero, of many shapes that are padded to few.
KERNELS = [
    (normal(2, 6, 20), 3, 1, "relu"),
    (normal(1, 20, 6), 6, 1, "silu"),
    (np.float32(1e-12) * normal(2, 27, 16), 4, 1, "relu"),
    (normal(1, 24, 2) @ normal(1, 2, 9), 5, 1, "relu"),
    (normal(1, 9, 2) @ normal(1, 2, 24), 5, 1, "identity"),
    (np.zeros((1, 12, 10), np.float32), 2, 1, "silu"),
    (normal(2, 12, 3 * 8), 3, 3, "relu"),
    (normal(1, 30, 3 * 4), 3, 3, "silu"),
    (np.linalg.svd(normal(1, 16, 16))[0] * np.geomspace(1, 1e-6, 16, dtype=np.float32), 9, 1, "relu"),
]
ILL_CONDITIONED = len(KERNELS) - 1


@functools.cache
def together(method):
    """Factors of all kernels, by one program."""

    def factors(ws):
        keys = jax.random.split(jax.random.key(0), 2)
        stacks = [
            Stack(keys[: len(w)], w, rank, activation, group)
            for w, (_, rank, group, activation) in zip(ws, KERNELS, strict=True)
        ]
        return methods.METHODS[method](stacks)

    return jax.tree.map(np.asarray, jax.jit(factors)([w for w, *_ in KERNELS]))


METHODS = ["kernel_projection", "spectral", pytest.param("norm_preserving", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", METHODS)
def test_kernels_of_many_shapes_are_projected_together(method):
    for i, ((w, rank, group, activation), (u, v)) in enumerate(zip(KERNELS, together(method), strict=True)):
        assert u.shape == (len(w), w.shape[1], rank)
        assert v.shape == (len(w), rank, w.shape[2])
        size = np.abs(w).max() or 1.0
        np.testing.assert_allclose(u.swapaxes(1, 2) @ u / size, v @ v.swapaxes(1, 2) / size, atol=1e-4)
        if method == "kernel_projection" and activation == "silu":
            continue  # quadrature is not that exact: risks are compared below
        settings = {"activation": "identity"} if method == "spectral" else {"activation": activation, "group": group}
        for w_i, y in zip(w, u @ v, strict=True):
            wanted = reference.projected(w_i, rank, **settings, normalized=method == "norm_preserving")
            np.testing.assert_allclose(y[:, determined(i, method)] / size, wanted[:, determined(i, method)] / size, atol=2e-5)


def determined(i, method):
    """Which columns have a direction: those that the ill-conditioned kernel leaves out are at right angles to the others."""
    return slice(KERNELS[i][1]) if i == ILL_CONDITIONED and method != "spectral" else slice(None)


def test_the_risk_is_that_of_float64():
    for (w, rank, group, activation), (u, v) in zip(KERNELS, together("kernel_projection"), strict=True):
        for w_i, u_i, v_i in zip(w, u, v, strict=True):
            y, exact = u_i.astype(np.float64) @ v_i, reference.projected(w_i, rank, activation, group)
            ours, least, whole = (reference.risk(w_i, part, activation, group) for part in (y, exact, 0 * exact))
            np.testing.assert_allclose(ours, least, rtol=1e-4, atol=1e-9 * whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kernel_projection", "spectral", "norm_preserving"])
def test_kernels_of_many_shapes_together_are_what_they_are_alone(method):
    for index, ((w, rank, group, activation), (u, v)) in enumerate(zip(KERNELS, together(method), strict=True)):
        size, columns = np.abs(w).max() or 1.0, determined(index, method)
        for i in range(len(w)):
            a, b = methods.factor(method, jax.random.key(0), jnp.asarray(w[i]), rank, activation=activation, group=group)
            np.testing.assert_allclose(u[i] @ v[i, :, columns] / size, a @ b[:, columns] / size, atol=2e-5)


def test_large_and_small_kernels_that_do_not_share_a_shape_are_projected_all_the_same(monkeypatch):
    monkeypatch.setattr(padding, "_SLACK", 0)
    monkeypatch.setattr(batched, "buckets", functools.partial(apart, padding.buckets))
    monkeypatch.setattr(padding, "buckets", functools.partial(apart, padding.buckets))
    described = [((8, 9), 3, "identity"), ((8, 10), 4, "relu"), ((11, 7), 2, "relu")]
    ws = [normal(2, *shape) for shape, _, _ in described]

    @jax.jit
    def factors(ws):
        stacks = [Stack(None, w, rank, activation) for w, (_, rank, activation) in zip(ws, described, strict=True)]
        return batched.project(stacks)

    for w, (_, rank, activation), (u, v) in zip(ws, described, factors(ws), strict=True):
        for w_i, y in zip(w, np.asarray(u) @ np.asarray(v), strict=True):
            np.testing.assert_allclose(y, reference.projected(w_i, rank, activation), atol=2e-5)


def apart(buckets, shapes, counts, work, alike=None, free=None):
    """`buckets` where nothing is free, so that only equal shapes share one."""
    found = buckets(shapes, counts, work, alike, 0)
    assert len(found) == len(set(shapes))
    return found


def test_best_lengths_are_found_in_pieces_where_outputs_are_many(monkeypatch):
    w = normal(1, 6, 25)

    def projected():
        [(u, v)] = jax.jit(lambda w: batched.project([Stack(None, w, 3, "silu")]))(w)
        return np.asarray(u) @ np.asarray(v)

    whole = projected()
    monkeypatch.setattr(batched, "_OUTPUTS", 10)
    np.testing.assert_allclose(projected(), whole, rtol=1e-5, atol=1e-6)  # float32, summed in another order
