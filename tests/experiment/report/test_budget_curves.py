"""What is lost by the budget, against plans whose losses and costs are known by other ways."""

import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.plan import budget_arguments, plan_by_rules
from lowrank_jax.experiment.report.budget_curves import budget_curves, draw
from tests import running

NETWORK = {"model__kwargs": {"widths": (64, 32)}}


def curves(**changes):
    return {curve.kind: curve for curve in budget_curves(running.config(**NETWORK, **changes))}


def test_without_a_budget_parameters_and_macs_are_shown():
    found = curves()
    assert list(found) == ["params", "macs"] and all(curve.own is None for curve in found.values())
    for curve in found.values():
        budgets, lost = np.array(curve.chosen).T
        assert (np.diff(budgets) > 0).all() and (np.diff(lost) <= 1e-12).all()
        assert budgets[-1] == 1 and lost[-1] == 0 < lost[0]


@pytest.mark.parametrize("objective", ["risk", "tolerance", "correlation"])
def test_the_chosen_ranks_lose_no_more_than_one_scale(objective):
    curve = curves(lowrank__budget__params=0.3, lowrank__budget__objective=objective)["params"]
    chosen = dict(curve.chosen)
    assert curve.uniform and all(chosen[budget] <= uniform + 1e-9 for budget, uniform in curve.uniform)
    assert curve.own == 0.3


def test_what_is_lost_is_what_the_plan_says():
    config = running.config(**NETWORK, lowrank__budget__params=0.3, lowrank__budget__objective="risk")
    (curve,) = budget_curves(config)
    budget, lost = curve.chosen[5]
    plan = lr.allocate(plan_by_rules(config), params=budget, objective="risk")
    assert lost == pytest.approx(sum(kernel.risk for kernel in plan.kernels if kernel.risk is not None))


@pytest.mark.parametrize("budget", [{"params": 0.3}, {"macs": 0.5}, {"seconds": 0.95, "chip": "h100", "min_scale": 0.0}])
def test_one_scale_is_the_one_that_a_budget_by_it_chooses(budget):
    config = running.config(**NETWORK, batch_size=4096, lowrank__budget={**budget, "objective": "uniform"})
    (curve,) = budget_curves(running.config(**NETWORK, batch_size=4096, lowrank__budget={**budget, "objective": "risk"}))
    for share, lost in curve.uniform:
        given = dict(budget_arguments(config)) | {curve.kind: share}
        plan = lr.allocate(plan_by_rules(config), **given)
        assert lost == pytest.approx(sum(kernel.risk for kernel in plan.kernels if kernel.risk is not None))
    assert {share for share, _ in curve.uniform} <= {share for share, _ in curve.chosen}


def test_a_budget_that_one_scale_cannot_meet_has_no_point_of_it():
    """The cheaper scheme of a convolution need not be its rule's own."""
    config = {"model__name": "resnet8", "model__kwargs": {"blocks": (1, 1), "widths": (4, 8)}, "lowrank__scheme": "channel"}
    for objective in ("risk", "uniform"):
        (curve,) = budget_curves(running.config(**config, lowrank__budget={"params": 0.3, "objective": objective}))
        assert 0 < len(curve.uniform) < 12 and draw([curve], "resnet8").startswith(b"\x89PNG")
        assert len(curve.chosen) == (12 if objective == "risk" else len(curve.uniform))


def test_the_smallest_possible_budget_is_the_first():
    config = running.config(**NETWORK, lowrank__budget__params=0.9)
    (curve,) = budget_curves(config)
    first = curve.chosen[0][0]
    lr.allocate(plan_by_rules(config), params=first)
    with pytest.raises(ValueError, match="impossible"):
        lr.allocate(plan_by_rules(config), params=first * 0.998)


def test_whole_numbers_and_seconds_are_fractions_too():
    seconds = {"lowrank__budget__seconds": 1.0, "lowrank__budget__chip": "h100", "batch_size": 4096}
    found = curves(lowrank__budget__params=2000, **seconds) | curves(lowrank__budget__bytes=8000)
    dense = plan_by_rules(running.config(**NETWORK)).dense_params
    assert found["bytes"].own == pytest.approx(8000 / (4 * dense)) and found["seconds"].own == 1.0
    assert found["params"].own == pytest.approx(2000 / dense)
    assert all(cost <= 1 + 1e-9 for cost, _ in found["bytes"].uniform)
    # A product of factors takes longer than the dense layer; a scale of 1 leaves all of them dense.
    assert any(cost == pytest.approx(1.0) and lost == 0 for cost, lost in found["seconds"].uniform)


def test_the_picture_has_a_panel_for_each_kind():
    found = list(curves().values())
    assert draw(found, "mlp").startswith(b"\x89PNG") and b"<svg" in draw(found[:1], "$x", ".svg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lowrank__method": "none"}, "a dense network has no ranks to choose"),
        ({"lowrank__rules": ({"path": ".*", "method": "none"},)}, "leave no kernel open"),
    ],
)
def test_where_there_is_nothing_to_choose_it_says_so(changes, message):
    with pytest.raises(ConfigError, match=message):
        curves(**changes)


def test_energies_bound_nothing_before_training():
    """Nor do they fail: they are those of trained kernels."""
    rules = {"lowrank__rules": ({"path": ".*/kernel", "energy": 0.5},), "lowrank__dense_warmup": "5 steps"}
    assert curves(**rules) == curves()


def test_one_scale_may_be_what_is_asked_for():
    (curve,) = budget_curves(running.config(**NETWORK, lowrank__budget__params=0.3, lowrank__budget__objective="uniform"))
    assert curve.own == 0.3 and draw([curve], "mlp").startswith(b"\x89PNG")
