"""The rest of a dense step, from estimates that are known."""

import dataclasses

import pytest

from lowrank_jax.experiment.config.plan import plan_by_rules
from lowrank_jax.experiment.preflight.compiler import Cost, Program
from lowrank_jax.experiment.preflight.estimate import Estimate
from lowrank_jax.experiment.preflight.networks import Network
from lowrank_jax.experiment.preflight.rest import rest_of
from lowrank_jax.experiment.preflight.table import Estimates
from lowrank_jax.planning.allocate import check_budget
from lowrank_jax.planning.chips import CHIPS
from lowrank_jax.planning.execution import dense_seconds
from tests import running

V5E = CHIPS["v5e"]


def low(**changes):
    budget = {"lowrank__budget__seconds": 0.95, "lowrank__budget__chip": "v5e", "lowrank__budget__min_scale": 0.0}
    return Network("low", running.config(**{**budget, "batch_size": 1024, **changes}))


def dense(seconds=0.02, parts=1, refused=False):
    cost = None if refused else Cost(1e9, 1e9, seconds, "", {})
    return Estimate("dense twin", True, False, 1024, parts, 1000, 3, 0, 0, 1, {}, {"training step": Program(1, cost, 1.0)})


def kernels(network, batch):
    return sum(dense_seconds(kernel, V5E, batch) for kernel in plan_by_rules(network.config).kernels)


def test_the_rest_is_what_the_kernels_leave_of_the_compilers_time():
    network = low()
    rest = rest_of(network, dense(0.02), 1.0, V5E, 4)
    assert rest.rest == pytest.approx(0.02 - kernels(network, 256), rel=1e-2)
    assert rest.missing == {"lowrank.budget.rest": f"{rest.rest:g}", "lowrank.budget.batch": "256"}
    text = f"--config.lowrank.budget.rest={rest.rest:g} --config.lowrank.budget.batch=256"
    assert str(rest).endswith(text) and "20 ms (compiler's time)" in str(rest)


def test_with_what_it_says_a_budget_is_a_fraction_of_the_compiled_step():
    network = low(lowrank__budget__batch=256)
    rest = rest_of(network, dense(10 * kernels(low(), 256)), 1.0, V5E, 4).rest
    plan, given = plan_by_rules(network.config), {"chip": V5E, "batch": 256, "seconds": 0.85, "min_scale": 0}
    check_budget(plan, **given)  # of the kernels alone a sixth could be saved
    with pytest.raises(ValueError, match="impossible"):  # nine tenths of the step are no kernels
        check_budget(plan, **given, rest=rest)


def test_a_time_that_is_not_believed_is_the_rooflines():
    rest = rest_of(low(), dense(None), 0.5, V5E, 4)
    assert (rest.step, rest.source) == (0.5, "roofline")


def test_a_batch_in_parts_is_one_part():
    rest = rest_of(low(optim__accumulate=4), dense(0.08, parts=4), 1.0, V5E, 8)
    assert rest.batch == 32 and rest.step == pytest.approx(0.02)


def test_a_core_has_the_rest_of_a_chip():
    half = CHIPS["v3"].half()
    network = low(lowrank__budget__chip="v3")
    rest = rest_of(network, dense(0.02), 1.0, half, 4)
    own = sum(dense_seconds(kernel, half, 256) for kernel in plan_by_rules(network.config).kernels)
    assert rest.rest == pytest.approx((0.02 - own) / 2, rel=1e-2)


def test_what_the_config_has_is_not_asked_for_again():
    said = rest_of(low(), dense(0.02), 1.0, V5E, 4)
    again = rest_of(
        low(lowrank__budget__rest=said.rest, lowrank__budget__batch=256, lowrank__budget__seconds=1.0), dense(0.02), 1.0, V5E, 4
    )
    assert not again.missing and str(again).endswith("The config says so.")
    other = rest_of(low(lowrank__budget__chip="v6e", lowrank__budget__seconds=1.0), dense(0.02), 1.0, V5E, 4)
    assert other.missing["lowrank.budget.chip"] == "v5e"


def test_without_a_rest_it_says_so():
    rest = rest_of(low(), dense(1e-9), 1.0, V5E, 4)
    assert rest.rest == 0 and "there is no rest to set" in str(rest) and "lowrank.budget.rest" not in rest.missing


@pytest.mark.parametrize(
    ("network", "twin"),
    [
        (Network("low", running.config(lowrank__budget__macs=0.5)), dense()),
        (Network("low", running.config(lowrank__method="none")), dense()),
        (low(mesh__data=4, mesh__model=2), dense()),
        (low(), dense(refused=True)),
    ],
)
def test_without_a_budget_of_seconds_or_a_step_there_is_none(network, twin):
    assert rest_of(network, twin, 1.0, V5E, 8) is None


def test_the_table_and_the_json_have_it():
    rest = rest_of(low(), dense(0.02), 1.0, V5E, 4)
    row = dataclasses.replace(dense(), programs={name: dense().programs["training step"] for name in ("training step", "x")})
    estimates = Estimates("v5e:2x2", V5E, 4, "fast", ((row,),), (rest,))
    assert str(estimates).splitlines()[-1] == str(rest) and "less optimised program" in str(estimates)
    assert '"kernels"' in estimates.json() and "less optimised" not in str(dataclasses.replace(estimates, effort="full"))
