import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lowrank_jax.kernel import LowRankKernel
from lowrank_jax.sharding import batch_sharding, make_mesh, put_batch, tree_shardings


@pytest.mark.parametrize(
    ("axes", "sizes"), [({}, (8, 1, 1)), ({"data": 2, "fsdp": -1}, (2, 4, 1)), ({"data": 2, "fsdp": 2, "model": 2}, (2, 2, 2))]
)
def test_one_axis_takes_the_devices_that_are_left(axes, sizes):
    assert tuple(make_mesh(**axes).shape.values()) == sizes


def test_batches_are_cut_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    batch = put_batch({"image": np.arange(8.0)}, mesh)["image"]
    assert batch.sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(batch, np.arange(8.0))


def test_the_rank_of_a_factor_is_never_cut():
    pair = LowRankKernel(jnp.ones((16, 8)), jnp.ones((8, 32)))
    stacked = LowRankKernel(jnp.ones((2, 16, 64)), jnp.ones((2, 64, 32)))
    shapes = jax.eval_shape(lambda: {"pair": pair, "stacked": stacked, "dense": jnp.ones((16, 4)), "scalar": jnp.ones(())})
    placed = tree_shardings(shapes, make_mesh(1, 4, 2))
    assert placed["pair"].u.spec == PartitionSpec("fsdp", None)
    assert placed["pair"].v.spec == PartitionSpec(None, "fsdp")
    assert placed["stacked"].u.spec == PartitionSpec("model", "fsdp", None)
    assert placed["dense"].spec == PartitionSpec("fsdp", "model")
    assert placed["scalar"].spec == PartitionSpec()


def test_a_mesh_of_data_alone_replicates_everything():
    placed = tree_shardings(jax.eval_shape(lambda: jnp.ones((16, 4))), make_mesh())
    assert placed.is_fully_replicated
