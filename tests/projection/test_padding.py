import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.projection import linalg, padding
from tests.projection.reference import normal

SHAPES = st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), min_size=1, max_size=8)


def work(shape):
    n, m = shape
    return float(n * m) * min(n, m)


@given(SHAPES, st.integers(1, 5))
def test_every_stack_is_in_one_bucket_and_padding_costs_no_more_than_a_tenth(shapes, count):
    counts, alike = [count] * len(shapes), [n <= m for n, m in shapes]
    found = padding.buckets(shapes, counts, work, alike)
    assert sorted(itertools.chain(*(bucket.members for bucket in found))) == list(range(len(shapes)))
    for bucket in found:
        assert bucket.shape == tuple(np.max([shapes[i] for i in bucket.members], axis=0))
        assert bucket.counts == (count,) * len(bucket.members)
        assert len({alike[i] for i in bucket.members}) == 1
    padded = sum(count * work(bucket.shape) * len(bucket.members) for bucket in found)
    assert padded <= 1.1 * count * sum(map(work, shapes)) + 1.01 * padding.FREE


def slow_buckets(shapes, counts, work, alike, free):
    """The definition: all pairs are looked at before each of the joins.  Tuples of shape and members."""
    groups = {}
    for i, key in enumerate(zip(shapes, alike, strict=True)):
        groups.setdefault(key, []).append(i)
    merged = [(shape, members) for (shape, _), members in groups.items()]

    def total(shape, members):
        return sum(counts[i] for i in members) * work(shape)

    def joined(one, other):
        return tuple(map(max, one[0], other[0])), sorted(one[1] + other[1])

    def cost(pair):
        return total(*joined(*pair)) - total(*pair[0]) - total(*pair[1])

    left = 0.1 * sum(total(*group) for group in merged) + free
    while pairs := [pair for pair in itertools.combinations(merged, 2) if alike[pair[0][1][0]] == alike[pair[1][1][0]]]:
        best = min(pairs, key=cost)
        if cost(best) > left:
            break
        left -= cost(best)
        merged = [group for group in merged if group not in best] + [joined(*best)]
    return [(shape, tuple(members)) for shape, members in merged]


SIZES = st.one_of(st.integers(1, 2000), st.sampled_from([1, 2, 64, 128, 256]))  # some of them equal, so that costs are


@given(st.lists(st.tuples(SIZES, SIZES, st.integers(1, 3), st.booleans()), min_size=1, max_size=14), st.integers(0, 10))
def test_grouping_joins_the_pair_that_costs_least_every_time(stacks, power):
    shapes, counts = [(n, m) for n, m, *_ in stacks], [count for _, _, count, _ in stacks]
    alike = [kind for *_, kind in stacks]
    found = padding.buckets(shapes, counts, work, alike, 10.0**power)
    assert [(bucket.shape, bucket.members) for bucket in found] == slow_buckets(shapes, counts, work, alike, 10.0**power)
    for bucket in found:
        assert bucket.counts == tuple(counts[i] for i in bucket.members)


def test_grouping_of_many_shapes_looks_at_each_pair_about_once():
    shapes, looked = [(i, i + 1) for i in range(1, 321)], []

    def counted(shape):
        looked.append(shape)
        return work(shape)

    found = padding.buckets(shapes, [1] * len(shapes), counted)
    assert 1 < len(found) < 32
    assert len(looked) < 2 * len(shapes) ** 2  # the definition looks at eleven million


def test_small_shapes_are_one_and_large_ones_stay_apart():
    def shapes(*sizes):
        return sorted(
            bucket.shape[0] for bucket in padding.buckets([(size,) for size in sizes], [1] * len(sizes), lambda s: s[0] ** 3)
        )

    assert shapes(3, 7, 20, 64, 100) == [100]
    assert shapes(500, 1000, 500) == [500, 1000]


# Sizes that are padded to one, of full rank, deficient and zero.
@st.composite
def gram_stacks(draw):
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    made = []
    for p in draw(st.sampled_from([(3, 8), (1, 5, 5), (8, 2, 3)])):
        rows = draw(st.sampled_from([0, 1, p, 2 * p]))
        a = rng.standard_normal((2, rows, p)) * 10.0 ** draw(st.integers(-6, 3))
        made.append((a.transpose(0, 2, 1) @ a).astype(np.float32))
    return made


eigenvectors = jax.jit(linalg.eigenvectors)
orthonormalizers = jax.jit(linalg.orthonormalizers)


@given(gram_stacks())
def test_padded_matrices_have_the_eigenvectors_that_they_have_alone(grams):
    for gram, vectors in zip(grams, eigenvectors(grams), strict=True):
        gram, vectors = np.asarray(gram, np.float64), np.asarray(vectors, np.float64)
        assert vectors.shape == gram.shape  # and what was cut off was zero:
        np.testing.assert_allclose(
            vectors.transpose(0, 2, 1) @ vectors, np.broadcast_to(np.eye(gram.shape[1]), gram.shape), atol=2e-6
        )
        values = np.einsum("kip,kij,kjp->kp", vectors, gram, vectors)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(gram)[:, ::-1], atol=2e-6 * np.abs(gram).max() * gram.shape[1])


def test_padding_is_no_matter_to_orthonormal_bases():
    rng = np.random.default_rng(0)
    ys = [rng.standard_normal((2, 40, p)).astype(np.float32) for p in (1, 3, 8)]
    grams = [y.transpose(0, 2, 1) @ y for y in ys]
    for gram, pair in zip(grams, orthonormalizers(grams), strict=True):
        for ours, theirs in zip(pair, orthonormalizers([gram])[0], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("lengths", [(1.0, 1.0, 1.0), (1.0, 1e-2, 1e-4)])
def test_a_basis_is_orthonormal_whatever_the_lengths_of_its_columns(lengths):
    y = np.random.default_rng(0).standard_normal((1, 40, 3)).astype(np.float32) * np.float32(lengths)
    [(turn, back)] = orthonormalizers([y.transpose(0, 2, 1) @ y])
    q = y @ turn
    np.testing.assert_allclose(q[0].T @ q[0], np.eye(3), atol=2e-6)
    np.testing.assert_allclose(turn[0] @ back[0], np.eye(3), atol=2e-6)


def test_a_column_of_rounding_spans_nothing():
    y = np.random.default_rng(0).standard_normal((1, 40, 3)).astype(np.float32) * np.float32([1, 1e-7, 0])
    [(turn, _)] = orthonormalizers([y.transpose(0, 2, 1) @ y])
    np.testing.assert_allclose(np.linalg.norm(y[0] @ turn[0], axis=0), [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-5, 1e-7])
def test_factors_are_balanced_down_to_singular_values_that_a_gram_matrix_does_not_hold(ratio):
    rng = np.random.default_rng(1)
    left, right = np.linalg.qr(rng.standard_normal((12, 12)))[0], np.linalg.qr(rng.standard_normal((40, 12)))[0]
    c = (left * np.geomspace(1, ratio, 12)) @ right.T
    u, v = (np.asarray(part, np.float64) for part in balance(np.eye(12, dtype=np.float32), c.astype(np.float32)))
    np.testing.assert_allclose(u @ v, c, atol=1e-6)
    np.testing.assert_allclose(u.T @ u, v @ v.T, atol=2e-5)


balance = jax.jit(linalg.balance)


def test_rebalancing_keeps_the_product_of_factors_of_any_sizes():
    sizes = np.float32([1e3, 1, 1e-6])
    us = [normal(0, 2, 9, 3) * sizes, np.float32(1e-15) * normal(1, 1, 20, 5)]
    vs = [normal(2, 2, 3, 7) / sizes[:, None], normal(3, 1, 5, 30)]
    for u, v, (a, b) in zip(us, vs, jax.jit(linalg.rebalance)(us, vs), strict=True):
        size, a, b = np.abs(u @ v).max(), np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a @ b / size, u @ v / size, atol=1e-5)
        np.testing.assert_allclose(a.swapaxes(1, 2) @ a / size, b @ b.swapaxes(1, 2) / size, atol=1e-4)
