import numpy as np
import pytest

from lowrank_jax.experiment.data.arrays import Arrays
from lowrank_jax.experiment.data.augment import Augmentation, augment, crop_shifted
from lowrank_jax.experiment.data.pipeline import EvalBatches, Feed, Shard, TrainBatches

SIZE = 50
VARIED = Augmentation(flip=True, crop_padding=2)


@pytest.fixture
def arrays():
    images = np.random.default_rng(0).integers(1, 256, (SIZE, 6, 5, 2)).astype(np.uint8)
    return Arrays(images, np.arange(SIZE, dtype=np.int32))


def test_every_epoch_holds_every_example_once_in_its_own_order(arrays):
    batches = TrainBatches(arrays, 16, 100, seed=3)
    labels = np.concatenate([batches[i]["label"] for i in range(25)])[: 8 * SIZE].reshape(8, SIZE)
    for epoch in labels:
        assert sorted(epoch) == list(range(SIZE))
    assert len({tuple(epoch) for epoch in labels}) == 8
    other = TrainBatches(arrays, 16, 100, seed=4)
    assert not np.array_equal(other[0]["label"], batches[0]["label"])


def test_the_iterator_goes_on_where_its_state_says(arrays):
    batches = TrainBatches(arrays, 16, 100, 3, VARIED)
    first = Feed(batches)
    for _ in range(7):
        next(first)
    state = first.get_state()
    expected = [next(first) for _ in range(5)]
    second = Feed(batches)
    second.set_state(state)
    for batch in expected:
        again = next(second)
        np.testing.assert_array_equal(again["image"], batch["image"])
        np.testing.assert_array_equal(again["label"], batch["label"])


def test_shards_together_are_the_batch(arrays):
    whole = TrainBatches(arrays, 16, 100, 3, VARIED)
    parts = [TrainBatches(arrays, 16, 100, 3, VARIED, Shard((i,), 4)) for i in range(4)]
    for step in (0, 3, 17):
        for name in ("image", "label"):
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), whole[step][name])


def test_augmentation_is_each_examples_own_and_new_every_epoch(arrays):
    large = TrainBatches(arrays, SIZE, 100, 3, VARIED)
    small = TrainBatches(arrays, 10, 500, 3, VARIED)
    # The same pass over the data in other batch sizes gives every example the same image.
    np.testing.assert_array_equal(large[1]["image"], np.concatenate([small[i]["image"] for i in range(5, 10)]))
    first, second = ({b["label"][i]: b["image"][i].tobytes() for i in range(SIZE)} for b in (large[0], large[1]))
    assert sum(first[label] == second[label] for label in first) < SIZE // 4


def test_flips_mirror_about_half_and_crops_shift():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (1000, 6, 5, 2)).astype(np.uint8)
    bits = rng.integers(0, 2**63, 1000).astype(np.uint64)
    flipped = augment(images, bits, Augmentation(flip=True))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert 450 < mirrored.sum() < 550
    np.testing.assert_array_equal(flipped[~mirrored], images[~mirrored])

    cropped = crop_shifted(images, bits, 2)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = np.zeros((5, 5), int)
    for image, source in zip(cropped, padded, strict=True):
        fits = [(y, x) for y in range(5) for x in range(5) if np.array_equal(source[y : y + 6, x : x + 5], image)]
        places[fits[0]] += 1
    assert places.sum() == 1000 and places.min() > 15  # 40 expected at each of 25 offsets


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_meets_every_example_once_whatever_the_batch_size(arrays, batch_size, count):
    batch_size *= count
    seen = []
    for index in range(count):
        for batch in EvalBatches(arrays, batch_size, Shard((index,), count)):
            assert len(batch["label"]) == batch_size // count
            seen += list(batch["label"][batch["mask"] > 0])
    assert sorted(seen) == list(range(SIZE))
