import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowrank_jax.experiment.preflight.collectives import collectives
from lowrank_jax.experiment.preflight.compiler import topology

CUT, WHOLE = PartitionSpec("x"), PartitionSpec()
KIB = 1024


def compiled(function, *arrays, out, devices) -> str:
    """The text of a program over eight devices; `arrays` are (shape, spec) of float32."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arrays]
    specs = tuple(spec for _, spec in arrays)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return str(jax.jit(mapped).lower(*shapes).compile().as_text())


def shift(x):
    return lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)])


def five_sums(x):
    return lax.scan(lambda total, _: (lax.pmean(2 * total + x, "x"), None), x, None, length=5)[0]


PROGRAMS = {
    # 1024 + 256 floats a device, summed.
    "all-reduce": (lambda a, b: lax.psum((a, b), "x"), [((8, 1024), CUT), ((8, 256), CUT)], (WHOLE, WHOLE), 5 * KIB),
    "all-gather": (lambda a: lax.all_gather(a, "x", tiled=True), [((64, 64), CUT)], WHOLE, 16 * KIB),
    "reduce-scatter": (lambda a: lax.psum_scatter(a, "x", tiled=True), [((64, 64), WHOLE)], CUT, 16 * KIB),
    # What a device holds of an array is an eighth of it.
    "all-to-all": (lambda a: lax.all_to_all(a, "x", 1, 0, tiled=True), [((64, 64), CUT)], CUT, 2 * KIB),
    "collective-permute": (shift, [((64, 64), CUT)], CUT, 2 * KIB),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_every_kind_counts_the_array_in_full(kind):
    function, arrays, out, expected = PROGRAMS[kind]
    assert collectives(compiled(function, *arrays, out=out, devices=jax.devices())) == {kind: expected}


def test_a_loop_counts_as_often_as_it_runs():
    text = compiled(five_sums, ((8, 1024), CUT), out=WHOLE, devices=jax.devices())
    assert "while(" in text and collectives(text) == {"all-reduce": 5 * 4 * KIB}


def test_a_program_without_collectives_has_none():
    assert collectives(compiled(jnp.sin, ((8, 8), CUT), out=CUT, devices=jax.devices())) == {}
    with pytest.raises(ValueError, match="not HLO text"):
        collectives("nothing")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_writes_its_programs_otherwise():
    compiled_for_tpu = functools.partial(compiled, devices=topology("v5e:2x4"))
    # It turns so small a reduce-scatter into an all-reduce of as many bytes.
    for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        function, arrays, out, expected = PROGRAMS[kind]
        assert collectives(compiled_for_tpu(function, *arrays, out=out)) == {kind: expected}
    text = compiled_for_tpu(five_sums, ((8, 1024), CUT), out=WHOLE)
    assert "known_trip_count" not in text and collectives(text) == {"all-reduce": 5 * 4 * KIB}


ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%scatter (p: bf16[8,16]) -> bf16[1,16] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %r = bf16[1,16]{1,0} reduce-scatter(%p), channel_id=1, dimensions={0}, to_apply=%sum
}

%begin (p: f32[4]) -> (f32[4], f32[32]) {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p), channel_id=7, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
}

%end (p: f32[4]) -> f32[32] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p), channel_id=7, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

ENTRY %main (x: f32[4], y: bf16[8,16]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = bf16[8,16]{1,0} parameter(1)
  %s = (f32[4]{0}, pred[]) all-reduce-start(%x, %q), channel_id=2, to_apply=%sum
  %d = (f32[4]{0}, pred[]) all-reduce-done(%s)
  %g = ((f32[4]{0}), f32[32]{0}) all-gather-start(%x), channel_id=3, dimensions={0}
  %h = f32[32]{0} all-gather-done(%g)
  %t = ((bf16[8,16]{1,0}), bf16[1,16]{1,0}, u32[]) async-start(%y), calls=%scatter
  %u = bf16[1,16]{1,0} async-done(%t), calls=%scatter
  %v = (f32[4], f32[32]) fusion(%x), kind=kCustom, calls=%begin
  %w = f32[32] fusion(%x), kind=kCustom, calls=%end
  ROOT %z = f32[4]{0} get-tuple-element(%d), index=0
}
"""


def test_an_operation_in_several_instructions_counts_once():
    assert collectives(ASYNCHRONOUS) == {"all-reduce": 16 + 1, "all-gather": 128 + 128, "reduce-scatter": 2 * 8 * 16}
