"""Budgets of a config: what contradicts them, and what is wrong with one."""

import json

import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.files import ConfigError, keys_given
from lowrank_jax.experiment.workdir.identity import digest_of
from tests import running
from tests.running import settings

NAME = "digits_resnet"  # its config sets a scale
LOST = r"lowrank.scale: 0\.1; lowrank.budget.params takes the place of a general scale; drop lowrank.scale for the budget, or "


def problems(overrides, config=NAME):
    with pytest.raises(ConfigError) as caught:
        configs.read(config, overrides)
    return caught.value.problems


def test_a_budget_takes_the_place_of_the_scale_that_a_config_file_sets():
    config = configs.read(NAME, {"lowrank.budget.params": 0.25})
    assert config.lowrank.scale == 0.25  # the file's own
    plan = configs.make_plan(config)
    assert plan.params <= 0.25 * plan.dense_params < plan.params * 1.05


@pytest.mark.parametrize(
    "overrides",
    [
        {"lowrank.budget.params": 0.25, "lowrank.scale": 0.1},
        [("lowrank.scale", "0.1"), ("lowrank.budget.params", "0.25")],
        [("lowrank", "{'scale': 0.1, 'budget': {'params': 0.25}}")],
        {"lowrank": {"scale": 0.1}, "lowrank.budget": {"params": 10_000}},
    ],
)
def test_a_scale_that_is_asked_for_beside_a_budget_is_refused_however_it_is_given(overrides):
    (problem,) = problems(overrides)
    assert problem == LOST.replace("\\", "") + "drop lowrank.budget.params for the scale"


def test_a_scale_that_is_asked_for_beside_the_budget_of_the_file_is_refused():
    given = configs.load(NAME)
    given.lowrank.budget.params = 0.25
    (problem,) = problems({"lowrank.scale": 0.1}, given)
    assert problem == LOST.replace("\\", "") + "set lowrank.budget.params=None for the scale"
    assert configs.read(given, {"lowrank.scale": 0.1, "lowrank.budget.params": None}).lowrank.scale == 0.1
    (problem,) = problems({"lowrank.rank": 3, "lowrank.scale": None, "lowrank.budget.macs": 0.5}, given)
    unset = "set lowrank.budget.params=None and drop lowrank.budget.macs for the rank"
    assert problem.startswith("lowrank.rank: 3; lowrank.budget.params and lowrank.budget.macs take") and problem.endswith(unset)


def test_the_last_of_several_overrides_is_what_counts():
    later = [("lowrank.scale", "0.1"), ("lowrank.budget.params", "0.25"), ("lowrank.scale", "None")]
    assert configs.read(NAME, later).lowrank.budget.params == 0.25
    later = [("lowrank.scale", "0.1"), ("lowrank.budget.params", "0.25"), ("lowrank.budget.params", "None")]
    assert configs.read(NAME, later).lowrank.scale == 0.1


def test_a_contradiction_is_told_beside_the_other_problems():
    found = problems({"lowrank.budget.params": 0.25, "lowrank.scale": 0.1, "batch_size": -3, "lowrank.budget.objectiv": "risk"})
    assert [problem.split(":")[0] for problem in found] == ["lowrank.scale", "batch_size", "lowrank.budget.objectiv"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"lowrank.bugdet.params": 0.25}, ["lowrank.bugdet: unknown key; did you mean lowrank.budget?"]),
        ({"lowrank.budget.parms": 0.25}, ["lowrank.budget.parms: unknown key; did you mean lowrank.budget.params?"]),
        ({"lowrnk": {"scale": 0.1}}, ["lowrnk: unknown key; did you mean lowrank?"]),
        ({"lowrank.budget": 0.25}, ["lowrank.budget: 0.25; must be a section with keys, such as lowrank.budget.params"]),
        (
            {"lowrank.budget.chip": "v5", "lowrank.budget.seconds": 0.9},
            ["lowrank.budget.chip: 'v5'; unknown; did you mean v5p?"],
        ),
        (
            {"lowrank.budget.params": 1.5, "lowrank.budget.objective": "risk"},
            [
                "lowrank.budget.params: 1.5; must be a fraction of the dense network above 0 and up to 1, such as 0.5, or a"
                " whole number"
            ],
        ),
        ({"lowrank.budget.objective": "risk"}, ["lowrank.budget.objective: says nothing without a budget"]),
    ],
)
def test_what_is_wrong_with_a_budget_is_told_once(overrides, expected):
    assert problems(overrides) == expected


def test_keys_within_a_mapping_are_given_one_by_one():
    given = [("lowrank", "{'scale': 0.1, 'budget': {'params': 0.25}}"), ("model.kwargs", "{'widths': (8,)}"), ("seed", "3")]
    expected = ["lowrank.scale", "lowrank.budget.params", "model.kwargs", "seed"]
    assert keys_given(given) == expected == keys_given(dict(given))


def test_the_tiny_experiment_takes_a_budget():
    config = configs.read(configs.default(), settings(lowrank__budget__macs=0.5))
    plan = configs.make_plan(config)
    assert plan.macs <= 0.5 * plan.dense_macs


def test_what_a_rule_says_of_normalisations_counts_as_it_does_from_python():
    """The network has BatchNorm behind its first two layers, which `plan` finds."""
    found, denied, said = (
        running.config(lowrank__budget={"params": 0.3, "objective": "risk"}, lowrank__rules=rules)
        for rules in ((), ({"path": "dense1/kernel", "normalized": False},), ({"path": "dense1/kernel", "normalized": True},))
    )
    rules = [lr.Rule("dense1/kernel", scale=1.0, normalized=False), lr.Rule(".*", scale=1.0)]
    plan = lr.plan(denied.build_model(), jnp.ones((2, 8, 8, 1)), rules, train=False)
    expected = lr.allocate(plan, params=0.3, objective="risk")
    ranks = [[getattr(kernel, "rank", None) for kernel in each.kernels] for each in (configs.make_plan(denied), expected)]
    assert ranks[0] == ranks[1]
    assert configs.make_plan(denied) != configs.make_plan(found)
    assert [kernel.risk for kernel in configs.make_plan(said).kernels] == [
        kernel.risk for kernel in configs.make_plan(found).kernels
    ]
    assert len({digest_of(config) for config in (found, denied, said)}) == 3
    stored = json.loads(json.dumps(configs.to_dict(denied)))
    assert configs.parse(stored) == denied
