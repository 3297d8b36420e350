import jax
import numpy as np
import pytest

from lowrank_jax.experiment.training.mixing import Mixing, erase, mix, normalizer, rectangle

SIDE = 24


def draws(n, fn):
    """`fn` under so many keys."""
    return jax.jit(jax.vmap(fn))(jax.random.split(jax.random.key(0), n))


def test_normalised_pixels_have_the_given_mean_and_deviation():
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 2)).astype(np.uint8)
    scaled = images / 255
    mean, std = scaled.mean((0, 1, 2)), scaled.std((0, 1, 2))
    x = np.asarray(jax.jit(normalizer(tuple(mean), tuple(std)))(images))
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, rtol=1e-5)


def test_nothing_asked_for_is_nothing_done():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    normalize = normalizer((0.5,), (0.25,))
    x, targets = jax.jit(Mixing(normalize, 3))(jax.random.key(0), images, np.array([0, 2, 1, 1]))
    np.testing.assert_allclose(x, (images / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(targets, np.eye(3)[[0, 2, 1, 1]])


def test_smoothing_spreads_its_share():
    smooth = jax.jit(Mixing(lambda x: x, 4, label_smoothing=0.2))
    _, targets = smooth(jax.random.key(0), np.zeros((1, 2, 2, 1), np.float32), np.array([1]))
    np.testing.assert_allclose(targets[0], [0.05, 0.85, 0.05, 0.05], rtol=1e-6)


def test_a_rectangle_is_where_its_corners_say():
    corners = np.array([[[1.0, 2.0]], [[3.0, 5.0]]])
    inside = np.asarray(jax.jit(lambda start, end: rectangle(start, end, 6, 7))(*corners))[0, :, :, 0]
    expected = np.zeros((6, 7), bool)
    expected[1:3, 2:5] = True
    np.testing.assert_array_equal(inside, expected)


def test_erased_is_one_rectangle_of_noise_as_often_and_as_large_as_stated():
    images = np.full((4000, SIDE, SIDE, 3), 100.0, np.float32)
    erased = np.asarray(jax.jit(lambda images: erase(jax.random.key(1), images, 0.4))(images))
    hit = (erased != 100).any(-1)
    touched = hit.any((1, 2))
    assert abs(touched.mean() - 0.4) < 4 * np.sqrt(0.24 / 4000)  # four standard errors
    for mask in hit[touched][:200]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert mask.sum() == len(rows) * len(columns)
    area = hit[touched].mean((1, 2))
    # Uniform from 0.02 to 1/3, to the rounding of sides; the longest of the flat ones are cut.
    assert area.min() > 0.01 and area.max() < 0.37 and abs(area.mean() - 0.1767) < 0.01
    noise = erased[hit]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    height, width = hit[touched].any(2).sum(1), hit[touched].any(1).sum(1)
    assert 0.45 < (height > width).mean() + (height == width).mean() / 2 < 0.55


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_the_same_convex_combination_of_images_and_targets(alpha):
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)
    targets = np.eye(3, dtype=np.float32)
    mixed, mixed_targets = (np.asarray(part) for part in draws(2000, lambda key: mix(key, images, targets, alpha, 0.0)))
    share = mixed_targets[:, 0, 0]
    np.testing.assert_allclose(mixed_targets[:, 0, 2], 1 - share, atol=1e-6)  # its neighbour is the one before it
    expected = share[:, None, None, None] * images[0] + (1 - share)[:, None, None, None] * images[2]
    np.testing.assert_allclose(mixed[:, 0], expected, atol=1e-5)
    assert abs(share.mean() - 0.5) < 0.04
    assert abs(share.var() - 1 / (4 * (2 * alpha + 1))) < 0.01  # of Beta(alpha, alpha)


def test_cutmix_weighs_targets_by_the_pixels_that_are_left():
    images = np.stack([np.zeros((SIDE, SIDE, 1), np.float32), np.ones((SIDE, SIDE, 1), np.float32)])
    mixed, targets = (
        np.asarray(part) for part in draws(3000, lambda key: mix(key, images, np.eye(2, dtype=np.float32), 0.0, 1.0))
    )
    assert set(np.unique(mixed)) == {0.0, 1.0}
    np.testing.assert_allclose(mixed[:, 0].mean((1, 2, 3)), targets[:, 0, 1], atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    # Without the edge the share kept would be uniform; a rectangle whose centre is uniform too loses some of its area there:
    # E(cut) = E over side s = sqrt(1 - kept) of (s - s^2/4)^2, and s^2 is uniform.
    s = np.sqrt(np.linspace(0, 1, 100001))
    assert abs(targets[:, 0, 1].mean() - ((s - s**2 / 4) ** 2).mean()) < 0.02


def test_with_both_a_batch_takes_one_or_the_other():
    images = np.stack([np.zeros((SIDE, SIDE, 1), np.float32), np.ones((SIDE, SIDE, 1), np.float32)])
    mixed, _ = draws(1000, lambda key: mix(key, images, np.eye(2, dtype=np.float32), 0.8, 1.0))
    hard = np.isin(np.asarray(mixed), (0.0, 1.0)).all((1, 2, 3, 4))
    assert 0.44 < hard.mean() < 0.56


def test_the_draw_is_the_keys():
    mixing = jax.jit(Mixing(normalizer((0.5,), (0.25,)), 5, 0.1, random_erasing=0.5, mixup=0.2, cutmix=1.0))
    images, labels = np.full((8, 6, 6, 1), 7, np.uint8), np.arange(8) % 5
    one, again, other = (mixing(jax.random.key(seed), images, labels)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
