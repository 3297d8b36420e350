import importlib.util
import sys

import jax
import pytest

from lowrank_jax import config as configs
from lowrank_jax.preflight import PreflightError, footprint, topology
from tests import running

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def test_a_footprint_is_of_one_device():
    whole, parts = (footprint(running.config(**mesh), jax.devices()) for mesh in ({}, {"mesh__data": 2, "mesh__fsdp": 4}))
    assert whole.params == parts.params == configs.make_plan(running.config()).params
    # Parameters and momentum in float32, BatchNorm's statistics, two counters.
    assert whole.state_bytes == 4 * (2 * whole.params + 2 * 64 + 2)
    assert whole.state_bytes / 4 < parts.state_bytes < whole.state_bytes / 2  # the number of classes is not a multiple of four
    assert whole.peak_bytes > whole.state_bytes and whole.flops > 0


def test_without_the_compiler_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(PreflightError, match=r"libtpu, .* is not installed: pip install 'lowrank_jax\[tpu\]'"):
        topology("v5e:2x4")


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
def test_a_step_compiles_for_a_slice_that_is_not_there():
    devices = topology("v5e:2x4")
    assert len(devices) == 8 and devices[0].platform == "tpu"
    assert footprint(running.config(), devices).peak_bytes > 0
    with pytest.raises(PreflightError, match="topology 'v5e:9x9'"):
        topology("v5e:9x9")
