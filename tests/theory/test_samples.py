"""Samples against numpy, whatever they come in."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.experiment.hosts.sharding import make_mesh
from lowrank_jax.theory import moments, samples
from lowrank_jax.theory.samples import SampleError, from_arrays, from_batches

ROWS = 64  # of a batch, at the least


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "_ELEMENTS", 1)
        yield


def draw(count, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3)).astype(dtype), rng.standard_normal((count, 2)).astype(dtype)


@jax.jit
def sums(x, y):
    return x.T @ y, jnp.sum(x**2, axis=0)


def means_of(x, y):
    return x.T @ y / len(x), (x**2).mean(axis=0)


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_means_are_those_of_all_samples_together(sizes):
    x, y = draw(sum(sizes))
    ends = np.cumsum(sizes)[:-1]
    read = from_batches([*zip(np.split(x, ends), np.split(y, ends), strict=True)])
    assert (read.inputs, read.outputs, read.dtype) == (3, 2, np.float64)
    assert_same(read.mean(sums), means_of(x, y))
    assert read.total(sums)[1] == len(x)
    assert {(a.shape, b.shape) for a, b, _ in read.read()} == {((ROWS, 3), (ROWS, 2))}
    np.testing.assert_array_equal(np.concatenate([np.asarray(a)[:rows] for a, _, rows in read.read()]), x)


def test_arrays_may_be_on_a_device():
    x, y = draw(150)
    assert_same(from_arrays(jnp.asarray(x), jnp.asarray(y)).mean(sums), means_of(x, y))


def test_files_are_mapped(tmp_path):
    x, y = draw(500)
    mapped = []
    for name, part in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", part)
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    assert all(isinstance(part, np.memmap) for part in mapped)
    assert_same(from_arrays(*mapped).mean(sums), means_of(x, y))


@pytest.mark.parametrize("count", [3, 8 * ROWS, 8 * ROWS + 77])
def test_devices_share_every_batch(count):
    x, y = draw(count)
    shared = from_arrays(x, y, make_mesh())
    for a, b, _ in shared.read():
        for part in (a, b):
            assert len(part.sharding.device_set) == 8
            assert {shard.data.shape for shard in part.addressable_shards} == {(ROWS, part.shape[1])}
    assert_same(shared.mean(sums), means_of(x, y))


def test_changed_samples_are_of_the_changed_sizes_and_padded_with_zeros():
    x, y = draw(100)
    root, turn = np.arange(12.0).reshape(3, 4), np.ones((2, 1))
    changed = from_arrays(x, y).through(jnp.asarray(root), jnp.asarray(turn))
    assert (changed.inputs, changed.outputs) == (4, 1)
    assert_same(changed.mean(sums), means_of(x @ root, y @ turn))
    *_, (a, b, rows) = changed.read()
    assert rows == 100 - ROWS
    assert not np.any(a[rows:])
    assert not np.any(b[rows:])


@pytest.mark.parametrize("count", [1, 64, 65, 71, 149, 10**9])
def test_a_head_is_the_first_samples_read_once(count):
    x, y = draw(150)

    class Counted:
        times = 0

        def __iter__(self):
            Counted.times += 1
            return iter([(x[:70], y[:70]), (x[70:], y[70:])])

    head, kept = from_batches(Counted()).head(count), min(count, len(x))  # of batches of 64, 6, 64 and 16
    before = Counted.times
    for _ in range(2):
        assert_same(head.mean(sums), means_of(x[:kept], y[:kept]))
        assert head.total(sums)[1] == kept
    assert Counted.times == before


@pytest.mark.parametrize(
    ("given_dtype", "computed"), [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)]
)
def test_dtypes_are_at_least_float32(given_dtype, computed):
    read = from_arrays(*draw(10, dtype=given_dtype))
    assert {read.dtype, *(part.dtype for part in next(read.read())[:2])} == {np.dtype(computed)}


def test_without_float64_in_jax_samples_are_float32():
    with jax.enable_x64(False):
        read = from_arrays(*draw(10))
        assert {read.dtype, *(part.dtype for part in next(read.read())[:2])} == {np.dtype(np.float32)}


def test_a_stream_passes_through_bounded_memory(monkeypatch):
    monkeypatch.setattr(samples, "_ELEMENTS", 2**22)
    count, n, size = 10**6, 8, 19_999

    class Stream:
        """Batches that are drawn when they are read, and then forgotten."""

        def __init__(self):
            self.given, self.alive, self.on_devices = [], [], []

        def __iter__(self):
            rng = np.random.default_rng(0)
            for begin in range(0, count, size):
                x = rng.standard_normal((min(size, count - begin), n), np.float32)
                self.given.append(weakref.ref(x))
                self.alive.append(sum(ref() is not None for ref in self.given))
                self.on_devices.append(sum(part.nbytes for part in jax.live_arrays()) - before)
                yield x, x[:, :1]

    before = sum(part.nbytes for part in jax.live_arrays())
    stream = Stream()
    overview = moments.look(from_batches(stream))
    assert overview.count == count
    assert abs(overview.covariance - np.eye(n)).max() < 5 * np.sqrt(2 / count)
    assert len(stream.given) > 50
    assert max(stream.alive) <= 3
    assert max(stream.on_devices) <= 4 * 2**14 * (n + 1) * 4


X, Y = draw(10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_batches(iter([(X, Y)])), "read several times: pass a list, or an object whose __iter__ starts over"),
        (lambda: from_batches((X, Y) for _ in range(2)), "read several times"),
        (lambda: from_batches([]), "there are no samples"),
        (lambda: from_batches([X, Y]), r"a batch must be a pair \(x, y\); got shape \[10, 3\]"),
        (lambda: from_batches([(X, Y, Y)]), r"a batch must be a pair \(x, y\); got a tuple of 3"),
        (lambda: from_batches([(X, Y), X]).mean(sums), r"a batch must be a pair \(x, y\); got shape \[10, 3\]"),
        (lambda: from_arrays(X.tolist(), Y), r"x must be a matrix, samples by inputs; got a list"),
        (lambda: from_arrays(X, Y[:, 0]), r"y must be a matrix, samples by outputs; got shape \[10\]"),
        (lambda: from_arrays(X[:0], Y[:0]), r"x must be a matrix, samples by inputs; got shape \[0, 3\]"),
        (lambda: from_arrays(X[None], Y), r"got shape \[1, 10, 3\]"),
        (lambda: from_arrays(X, Y > 0), "y must contain real numbers; its dtype is bool"),
        (lambda: from_arrays(X.astype(int), Y), "x must contain real numbers; its dtype is int64"),
        (lambda: from_arrays(X + 1j, Y), "x must contain real numbers; its dtype is complex128"),
        (lambda: from_arrays(X, Y[:9]), "x has 10 samples, y has 9"),
        (
            lambda: from_batches([(X, Y), (X[:, :2], Y)]).mean(sums),
            "a batch has 2 inputs and 2 outputs; the first one has 3 and 2",
        ),
        (lambda: from_batches([(X, Y), (X, Y[:4])]).mean(sums), "x has 10 samples, y has 4"),
        (
            lambda: from_arrays(X, Y, jax.make_mesh((8,), ("rows",))),
            r"the mesh has the axes \['rows'\]; samples are sharded over an axis named 'data'",
        ),
    ],
)
def test_what_are_no_samples_is_refused(call, message):
    with pytest.raises(SampleError, match=message):
        call()
