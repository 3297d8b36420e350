import dataclasses
import importlib.util

import jax
import pytest

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.preflight import arms
from lowrank_jax.experiment.preflight.arms import Arm, Cache, Compiler, Wanted, grouped, in_parts
from lowrank_jax.experiment.preflight.compiler import Cost, Program, compile_program, programs, topology
from lowrank_jax.experiment.preflight.report import Report, run
from lowrank_jax.experiment.training.build import build
from lowrank_jax.planning.chips import CHIPS
from tests import running

V5E = CHIPS["v5e"]
GIB = 2**30


# Quick to compile.
SMALL = {"lowrank__method": "none", "model__kwargs": {"widths": (8,)}}


def compiler_of(folder, say=lambda line: None):
    """The compiler of this machine."""
    return Compiler("cpu", jax.devices(), V5E, "fast", Cache(folder), say)


def test_what_was_compiled_is_remembered_by_the_program(tmp_path):
    said = []
    compiler = compiler_of(tmp_path, said.append)
    # Learning rate and seed are arguments of the programs.
    arms = [(Wanted("a", running.config(**SMALL, seed=seed, optim__lr=0.1 * seed)), True) for seed in (1, 2)]
    first, twin = compiler.estimates(arms)
    assert sum("compiling" in line for line in said) == 3 and not any("remembered" in line for line in said)
    assert twin == first
    said.clear()
    # Parameters and momentum in float32, two counters; of which evaluation reads the parameters.
    assert first.state_bytes == 4 * (2 * first.params + 2) and first.beside == {"evaluation": 4 * (first.params + 2)}
    assert first.peak_bytes("evaluation") == first.programs["evaluation"].peak_bytes + first.beside["evaluation"]
    (again,) = compiler.estimates([(Wanted("a", running.config(**SMALL, seed=3, optim__lr=0.3)), True)])
    assert again == first and len(said) == 3 and all("known from an earlier preflight" in line for line in said)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_batch_in_parts_takes_as_many_products_as_a_whole_one():
    """The compiler counts the body of a loop once, whose length TPUs do not state."""
    devices, costs = topology("v5e:2x4"), []
    for parts in (1, 4):
        experiment = build(running.config(**SMALL, batch_size=1024, optim__accumulate=parts), devices=devices)
        costs.append(in_parts(compile_program(experiment.lower_train_step(), V5E), parts).cost)
    assert costs[1].flops == pytest.approx(costs[0].flops, rel=0.1)
    assert costs[1].collectives["all-reduce"] > 3 * 4 * experiment.plan.params  # gradients are exchanged after each part


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({"log__every": "7 steps"}, set()),
        ({"eval__batch_size": 128}, {"evaluation"}),
        ({"batch_size": 64}, {"training step"}),
        ({"mesh__data": 2, "mesh__fsdp": 4}, {"training step", "evaluation", "initialiser"}),
        ({"optim__ema_decay": 0.9}, {"training step", "initialiser"}),
    ],
)
def test_a_program_is_told_from_another(tmp_path, changes, others):
    compiler = compiler_of(tmp_path)
    mine, its = (
        {name: compiler.key(lower()) for name, lower in programs(build(running.config(**SMALL, **given))).items()}
        for given in ({}, changes)
    )
    assert {name for name in mine if mine[name] != its[name]} == others


def test_another_effort_topology_or_chip_is_another_question(tmp_path):
    lowered, compiler = jax.jit(lambda x: x + 1).lower(1.0), compiler_of(tmp_path)
    changes = ({}, {"effort": "full"}, {"topology": "other"}, {"chip": CHIPS["v4"]})
    assert len({dataclasses.replace(compiler, **change).key(lowered) for change in changes}) == 4


def test_an_answer_that_cannot_be_read_is_asked_for_again(tmp_path):
    cache = Cache(tmp_path / "new")
    programs = {
        "whole": Program(5, Cost(1.0, 2.0, None, "it has none", {"all-reduce": 4}), 0.5),
        "refused": Program(7, None, 0.25),
    }
    for key, program in programs.items():
        cache.put(key, program)
        assert cache.get(key) == program
    (tmp_path / "new" / "whole.json").write_text('{"peak_bytes"')
    (tmp_path / "new" / "refused.json").write_text("{}")
    assert cache.get("whole") is cache.get("refused") is cache.get("other") is None
    assert Cache(None).get("whole") is None


def test_state_is_counted_as_it_lies_on_one_device():
    whole, parts = (
        arms.device_bytes(build(running.config(**SMALL, **mesh)).shapes) for mesh in ({}, {"mesh__data": 2, "mesh__fsdp": 4})
    )
    assert whole / 4 < parts < whole / 2  # the number of classes is not a multiple of four


def test_every_arm_has_a_dense_twin():
    arms = {
        "a": running.config(lowrank__scale=0.1),
        "b": running.config(lowrank__scale=0.2, seed=1),
        "c": running.config(batch_size=64),
        "d": running.config(batch_size=64, lowrank__method="none"),
    }
    one, other = grouped([Wanted(name, config) for name, config in arms.items()])
    assert [arm.name for arm in one.others] == ["a", "b"] and [arm.name for arm in other.others] == ["c"]
    assert one.dense.name == "dense twin of a" and one.dense.dense and not one.wanted
    assert other.dense.name == "d" and other.wanted
    assert one.dense.config.model == arms["a"].model


def test_no_dense_arm_that_was_asked_for_is_left_out():
    dense = [Wanted(f"seed={seed}", running.config(lowrank__method="none", seed=seed)) for seed in (1, 2)]
    (group,) = grouped([*dense, Wanted("low", running.config(seed=1))])
    assert (group.dense.name, group.wanted, [arm.name for arm in group.others]) == ("seed=1", True, ["low", "seed=2"])


def test_an_answer_that_cannot_be_kept_is_given_all_the_same(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    program = compiler_of(tmp_path / "file" / "folder", said.append).program("sum", lambda: jax.jit(lambda x: x + 1).lower(1.0))
    assert program.cost is not None and any("cannot be remembered" in line for line in said)


def arm(name, *, wanted=True, dense=False, peak=GIB, flops=1e12, seconds=0.02, refused=False, beside=0):
    cost = None if refused else Cost(flops, 1e10, seconds, "" if seconds else "it has none", {"all-reduce": 4000})
    programs = {"training step": Program(peak, cost, 1.0), "evaluation": Program(GIB // 4, cost, 1.0)}
    factored, merged = (0, 0) if dense else (2, 1)
    return Arm(name, dense, wanted, 1024, 1, 1000, 5, factored, merged, GIB // 2, {"evaluation": beside}, programs)


def report(*arms):
    return Report("v5e:4x4", V5E, 16, "fast", (arms,))


def test_the_table_sets_an_arm_beside_its_twin():
    text = str(report(arm("dense twin", dense=True, wanted=False), arm("scale=0.1", flops=4e12, seconds=None)))
    assert text.startswith("TPU v5e 4x4, 16 chips, global batch 1024 (64 a chip); compiler estimates, nothing ran")
    dense, low = (line for line in text.splitlines() if line.startswith(("dense twin  1 T", "scale=0.1   4 T")))
    # 1e10 bytes at 819 GB/s are 12.2 ms, 4e12 FLOPs at 197 TFLOP/s 20.3.
    assert "memory     12.2 ms" in dense and "20 ms" in dense and "83,866" in dense
    assert "4 T (4.00)" in low and "products   20.3 ms (1.66)" in low and " - " in low
    assert "0 of 5  " in text and "2 of 5, 1 merged  " in text and "scale=0.1: no time of the compiler's: it has none" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak": 17 * GIB}, "low does not fit: its training step wants 17 GiB of 15.8 GiB"),
        ({"refused": True, "peak": 20 * GIB}, "low does not fit: its training step wants 20 GiB"),
        ({"beside": 16 * GIB}, "low does not fit: its evaluation wants 16.2 GiB"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    fitting, broken = arm("dense twin", dense=True, wanted=False), arm("low", **changes)
    assert report(fitting, arm("low")).fits
    assert not report(fitting, broken).fits and message in str(report(fitting, broken))
    # Of a twin that nobody asked for it is said alone.
    twin = dataclasses.replace(broken, wanted=False, name="twin")
    assert report(twin, arm("low")).fits and "twin does not fit" in str(report(twin, arm("low")))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_arms_are_judged_for_the_devices_of_the_slice():
    arms = [Wanted("a", running.config()), Wanted("b", running.config(batch_size=40))]
    with pytest.raises(ConfigError) as caught:
        run(arms, "v5e:8x8", source="config", effort="fast", cache=Cache(None), say=lambda line: None)
    assert [problem.split("; must")[0] for problem in caught.value.problems] == ["batch_size: 32", "batch_size: 40"]
    assert caught.value.problems[1].endswith("(in b)")
