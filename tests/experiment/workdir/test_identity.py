import json

from lowrank_jax.experiment.config import to_dict
from lowrank_jax.experiment.workdir.identity import config_digest, differences
from tests import running

FIRST = {"objective": "correlation", "min_scale": 0.0}
"""The first defaults of a budget's settings, as earlier versions stored them."""


def stored(budget=None, **values):
    """A config as it is in a work directory, with these values of the budget's settings, and without those of value `None`."""
    config = to_dict(running.config(lowrank__budget=budget or {}))
    settings = {**config["lowrank"]["budget"], **values}
    config["lowrank"]["budget"] = {key: value for key, value in settings.items() if value is not None}
    return json.loads(json.dumps(config))


def test_without_a_budget_its_settings_make_no_other_experiment():
    before, now = stored(**FIRST), stored()
    assert config_digest(before) == config_digest(now) == config_digest(stored(objective=None))
    assert not differences(before, now)


def test_with_a_budget_a_first_default_stays_left_out_and_the_present_one_is_another_experiment():
    budget = {"params": 0.5}
    before = stored(budget, **FIRST)
    without = stored(budget, **dict.fromkeys(FIRST))
    assert config_digest(before) == config_digest(without) != config_digest(stored(budget))
    assert any(
        "lowrank.budget.objective is correlation there, tolerance here" in line for line in differences(before, stored(budget))
    )
