"""Plans of whole networks from a budget, as files.

UPDATE_GOLDEN=1 python -m pytest tests/planning/test_golden.py      rewrites them.

The curves are of Gaussian kernels, drawn with a fixed seed by NumPy.  Draws of equal seeds may differ between its versions, and
where two kernels' next ranks are worth the same to a few digits, either may get its rank: so a rank may differ by one, or by
what one per cent of the budget buys.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.planning.plans import FactoredKernel
from tests.running import ROOT

BUDGETS = {"params": 0.25, "macs": 0.5}
NETWORKS = ("resnet50", "efficientnet_b0")


@functools.cache
def whole(name):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return lr.plan(models.build(name, num_classes=1000), images, [lr.Rule(".*kernel", scale=1.0)])


def ranks(text):
    """By the kernel's name the rank in a plan's table, None if it is dense."""
    rows = [re.split(r"  +", line) for line in text.splitlines()[1:] if re.match(r"\S+kernel ", line)]
    return {name: None if rank == "-" else int(rank) for name, _, rank, *_ in rows}


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_golden_plan(name, kind):
    plan = lr.allocate(whole(name), **{kind: BUDGETS[kind]})
    file = ROOT / "tests" / "golden" / f"budget_{name}_{kind}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(f"{plan}\n")
    expected = ranks(file.read_text())
    assert list(expected) == [kernel.name for kernel in plan.kernels]
    spent, total = (plan.params, plan.dense_params) if kind == "params" else (plan.macs, plan.dense_macs)
    budget = BUDGETS[kind] * total
    assert 0.99 * budget < spent <= budget
    for kernel in plan.kernels:
        rank, golden = (kernel.rank if isinstance(kernel, FactoredKernel) else None), expected[kernel.name]
        assert rank == golden or differs_little(kernel, rank, golden, kind, budget), f"{kernel.name}: {rank}, not {golden}"


def differs_little(kernel, rank, golden, kind, budget):
    if rank is not None and golden is not None and abs(rank - golden) <= 1:
        return True

    def cost(rank):
        if rank is None:
            return kernel.params if kind == "params" else kernel.macs
        return getattr(kernel.choices[0], kind)(rank)

    return abs(cost(rank) - cost(golden)) <= 0.01 * budget


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_are_seen_as_they_are(name):
    """Every convolution of ResNet-50 and most of EfficientNet-B0's are followed by a BatchNorm."""
    found = [kernel for kernel in whole(name).kernels if kernel.normalized == "each"]
    others = {kernel.name for kernel in whole(name).kernels if kernel.choices} - {kernel.name for kernel in found}
    assert found and all(name == "head/kernel" or "/se/" in name for name in others)
