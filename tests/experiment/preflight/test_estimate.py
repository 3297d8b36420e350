import dataclasses
import importlib.util

import jax
import pytest

from lowrank_jax.experiment.preflight.cache import Cache
from lowrank_jax.experiment.preflight.compiler import Cost, Program, compile_program, programs, topology
from lowrank_jax.experiment.preflight.estimate import Estimator, device_bytes, in_parts
from lowrank_jax.experiment.preflight.networks import Network
from lowrank_jax.experiment.training.build import build
from lowrank_jax.planning.chips import CHIPS
from tests import running

V5E = CHIPS["v5e"]
# Quick to compile.
SMALL = {"lowrank__method": "none", "model__kwargs": {"widths": (8,)}}


def compiler_of(folder, say=lambda line: None):
    """The compiler of this machine."""
    return Estimator("cpu", jax.devices(), V5E, "fast", Cache(folder), say)


def test_what_was_compiled_is_remembered_by_the_program(tmp_path):
    said = []
    compiler = compiler_of(tmp_path, said.append)
    # Learning rate and seed are arguments of the programs.
    networks = [(Network("a", running.config(**SMALL, seed=seed, optim__lr=0.1 * seed)), True) for seed in (1, 2)]
    first, twin = compiler.estimates(networks)
    assert sum("compiling" in line for line in said) == 3 and not any("cannot be cached" in line for line in said)
    assert twin == first
    said.clear()
    # Parameters and momentum in float32, two counters; of which evaluation reads the parameters.
    assert first.state_bytes == 4 * (2 * first.params + 2) and first.resident == {"evaluation": 4 * (first.params + 2)}
    assert first.peak_bytes("evaluation") == first.programs["evaluation"].peak_bytes + first.resident["evaluation"]
    (again,) = compiler.estimates([(Network("a", running.config(**SMALL, seed=3, optim__lr=0.3)), True)])
    assert again == first and len(said) == 3 and all("cached by an earlier preflight" in line for line in said)


def test_a_batch_in_parts_counts_as_often_as_it_has_parts():
    cost = Cost(10.0, 4.0, 0.5, "", {"all-reduce": 7})
    assert in_parts(Program(3, cost, 1.0), 1).cost == cost
    assert in_parts(Program(3, cost, 1.0), 4) == Program(3, Cost(40.0, 16.0, 2.0, "", {"all-reduce": 7}), 1.0)
    assert in_parts(Program(3, Cost(10.0, 4.0, None, "why", {}), 1.0), 4).cost == Cost(40.0, 16.0, None, "why", {})
    assert in_parts(Program(3, None, 1.0), 4).cost is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_batch_in_parts_takes_as_many_products_as_a_whole_one():
    """The compiler counts the body of a loop once, whose length TPUs do not state."""
    devices, costs = topology("v5e:2x4"), []
    for parts in (1, 4):
        experiment = build(running.config(**SMALL, batch_size=1024, optim__accumulate=parts), devices=devices)
        costs.append(in_parts(compile_program(experiment.lower_train_step(), V5E), parts).cost)
    assert costs[1].flops == pytest.approx(costs[0].flops, rel=0.1)
    assert costs[1].collectives["all-reduce"] > 3 * 4 * experiment.plan.params  # gradients are exchanged after each part


def keys_of(**changes):
    """The cache's keys of a network's programs."""
    compiler = compiler_of(None)
    return {name: compiler.key(lower()) for name, lower in programs(build(running.config(**{**SMALL, **changes}))).items()}


def test_kernels_with_open_ranks_have_the_programs_of_dense_ones():
    rules = ({"path": ".*", "energy": 0.9},)
    assert keys_of(lowrank__method="spectral", lowrank__rules=rules, lowrank__dense_warmup="5 steps") == keys_of()


@pytest.fixture(scope="module")
def keys():
    return keys_of()


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
def test_a_program_is_told_from_another(keys, changes, others):
    its = keys_of(**changes)
    assert {name for name in keys if keys[name] != its[name]} == others


def test_another_effort_topology_or_chip_is_another_question(tmp_path):
    lowered, compiler = jax.jit(lambda x: x + 1).lower(1.0), compiler_of(tmp_path)
    changes = ({}, {"effort": "full"}, {"topology": "other"}, {"chip": CHIPS["v4"]})
    assert len({dataclasses.replace(compiler, **change).key(lowered) for change in changes}) == 4


def test_state_is_counted_as_it_lies_on_one_device():
    whole, parts = (
        device_bytes(build(running.config(**SMALL, **mesh)).shapes) for mesh in ({}, {"mesh__data": 2, "mesh__fsdp": 4})
    )
    assert whole / 4 < parts < whole / 2  # the number of classes is not a multiple of four


def test_an_answer_that_cannot_be_kept_is_given_all_the_same(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    program = compiler_of(tmp_path / "file" / "folder", said.append).program("sum", lambda: jax.jit(lambda x: x + 1).lower(1.0))
    assert program.cost is not None and any("cannot be cached" in line for line in said)
