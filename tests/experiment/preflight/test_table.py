"""The tables of a preflight, from estimates that are known."""

import dataclasses
import json

import pytest

from lowrank_jax.experiment.preflight.compiler import Cost, Program
from lowrank_jax.experiment.preflight.estimate import Estimate
from lowrank_jax.experiment.preflight.table import Estimates
from lowrank_jax.planning.chips import CHIPS

V5E = CHIPS["v5e"]
GIB = 2**30


def estimate(name, *, requested=True, dense=False, peak=GIB, flops=1e12, seconds=0.02, refused=False, resident=0):
    cost = None if refused else Cost(flops, 1e10, seconds, "" if seconds else "the compiler gives none", {"all-reduce": 4000})
    programs = {"training step": Program(peak, cost, 1.0), "evaluation": Program(GIB // 4, cost, 1.0)}
    factored, merged = (0, 0) if dense else (2, 1)
    return Estimate(name, dense, requested, 1024, 1, 1000, 5, factored, merged, GIB // 2, {"evaluation": resident}, programs)


def estimates(*rows):
    return Estimates("v5e:4x4", V5E, 16, "fast", (rows,))


def test_the_table_compares_a_network_with_its_twin():
    text = str(estimates(estimate("dense twin", dense=True, requested=False), estimate("scale=0.1", flops=4e12, seconds=None)))
    assert text.startswith("TPU v5e 4x4, 16 chips, global batch 1024 (64 per chip); compiler estimates, nothing was run")
    dense, low = (line for line in text.splitlines() if line.startswith(("dense twin  1 T", "scale=0.1   4 T")))
    # 1e10 bytes at 819 GB/s are 12.2 ms, 4e12 FLOPs at 197 TFLOP/s 20.3.
    assert "memory    12.2 ms" in dense and "20 ms" in dense and "83,866" in dense
    assert "4 T (4.00)" in low and "compute   20.3 ms (1.66)" in low and " - " in low
    assert (
        "0 of 5  " in text
        and "2 of 5, 1 merged  " in text
        and "scale=0.1: the compiler's time is left out: the compiler gives none" in text
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak": 17 * GIB}, "low does not fit: its training step needs 17 GiB, 15.8 GiB are available"),
        ({"refused": True, "peak": 20 * GIB}, "low does not fit: its training step needs 20 GiB"),
        ({"resident": 16 * GIB}, "low does not fit: its evaluation needs 16.2 GiB"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    fitting, broken = estimate("dense twin", dense=True, requested=False), estimate("low", **changes)
    assert estimates(fitting, estimate("low")).fits
    assert not estimates(fitting, broken).fits and message in str(estimates(fitting, broken))
    # A twin that nobody asked for decides nothing.
    twin = dataclasses.replace(broken, requested=False, name="twin")
    assert estimates(twin, estimate("low")).fits and "twin does not fit" in str(estimates(twin, estimate("low")))


def test_open_ranks_are_said():
    low = dataclasses.replace(estimate("low"), waiting=3)
    text = str(estimates(estimate("dense warm-up", dense=True), low))
    assert "2 of 5, 1 merged, 3 open" in text
    assert "low: the ranks of 3 kernels are open until the dense warm-up ends, and they are dense here." in text
    assert [arm["open"] for arm in json.loads(estimates(estimate("dense warm-up", dense=True), low).json())["arms"]] == [0, 3]


def test_the_json_has_the_figures_and_their_ratios():
    written = json.loads(estimates(estimate("dense twin", dense=True, requested=False), estimate("low", flops=4e12)).json())
    dense, low = written["arms"]
    assert written["topology"] == "v5e:4x4" and written["devices"] == 16 and written["fits"]
    assert (low["name"], low["dense_twin"], low["factored"], low["merged"]) == ("low", "dense twin", 2, 1)
    assert low["ratio"]["flops"] == 4 and low["collective_bytes"] == 4000 and dense["compiler_seconds"] == 0.02
    assert low["programs"]["training step"]["cost"]["collectives"] == {"all-reduce": 4000}
