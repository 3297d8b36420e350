"""Which of several processes writes what, by two of them on loopback."""

import sys

import pytest

from tests import running

SAVES = """
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowrank_jax.experiment.hosts.processes import ProcessOptions, start
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints

folder, size, *flags = sys.argv[1:]
coordinator, processes, process = (flag.partition("=")[2] for flag in flags)
start(ProcessOptions(coordinator, int(processes), int(process)))
everywhere = NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec())
state = {"array": jax.jit(lambda: jnp.arange(float(size)), out_shardings=everywhere)()}
with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
assert restored.step == 1 and not restored.damaged
assert (jax.device_get(restored.state["array"]) == jax.device_get(state["array"])).all()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "writers"), [(2**10, 1), (2**19, 2)], ids=["small", "large"])
def test_processes_share_the_writing_of_a_large_array_that_all_of_them_have(tmp_path, size, writers):
    processes = running.start_all([sys.executable, "-c", SAVES, str(tmp_path / "c"), str(size)], 2)
    outputs = running.wait_all(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    parts = [part / "d" for part in (tmp_path / "c" / "1" / "state").glob("ocdbt.process_*")]
    arrays = sum(sum(file.stat().st_size for file in part.iterdir()) > size for part in parts)  # more than metadata
    assert arrays == writers, parts
