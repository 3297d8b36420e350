import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.experiment.hosts.sharding import make_mesh
from lowrank_jax.experiment.workdir.digest import digests

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.bool_)


@given(st.integers(0, 31), st.integers(0, 15))
def test_one_flipped_bit_anywhere_changes_the_digest(bit, element):
    x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    flipped = x.copy()
    flipped.view(np.uint32)[element] ^= np.uint32(1 << bit)
    assert digests(jax.device_put({"x": x})) != digests(jax.device_put({"x": flipped}))


def test_equal_arrays_have_equal_digests_and_swapped_elements_do_not():
    """Of every dtype, through one program."""
    arrays = {np.dtype(dtype).name: np.arange(24).reshape(4, 6).astype(dtype) for dtype in DTYPES}
    swapped = {name: x.copy() for name, x in arrays.items()}
    for x in swapped.values():
        x[0, [0, 1]] = x[0, [1, 0]]
    first, again, other = (digests(jax.device_put(tree)) for tree in (arrays, arrays, swapped))
    assert first == again and len(first) == len(DTYPES)
    for name in arrays:
        assert first[name] != other[name], name


def test_digests_do_not_depend_on_the_layout():
    mesh = make_mesh()
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    layouts = [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")]
    assert len({str(digests({"x": jax.device_put(x, NamedSharding(mesh, spec))})) for spec in layouts}) == 1
