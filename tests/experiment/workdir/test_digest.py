import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.experiment.hosts.sharding import make_mesh
from lowrank_jax.experiment.workdir.digest import digests


@given(st.integers(0, 31), st.integers(0, 15))
def test_one_flipped_bit_anywhere_changes_the_digest(bit, element):
    x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    flipped = x.copy()
    flipped.view(np.uint32)[element] ^= np.uint32(1 << bit)
    assert digests({"x": jnp.asarray(x)}) != digests({"x": jnp.asarray(flipped)})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.bool_])
def test_equal_arrays_have_equal_digests_and_swapped_elements_do_not(dtype):
    x = jnp.arange(24).reshape(4, 6).astype(dtype)
    assert digests({"x": x}) == digests({"x": x + jnp.zeros_like(x)})
    assert digests({"x": x}) != digests({"x": x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])})


def test_digests_do_not_depend_on_the_layout():
    mesh = make_mesh()
    x = jax.random.normal(jax.random.key(0), (16, 8))
    layouts = [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")]
    assert len({str(digests({"x": jax.device_put(x, NamedSharding(mesh, spec))})) for spec in layouts}) == 1
