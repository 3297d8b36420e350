"""What was decided, as plain values and back."""

import json

import flax.linen as nn
import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax.planning.decided import from_record, to_record

OPEN = lr.plan(
    nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(12), nn.relu, nn.Dense(3)]),
    jnp.ones((2, 20)),
    [lr.Rule("layers_4/kernel"), lr.Rule(".*kernel", scale=1.0)],
)


@pytest.mark.parametrize("budget", [0.4, 0.7, 1.0])
def test_a_plan_comes_back_with_all_that_its_table_shows(budget):
    plan = lr.allocate(OPEN, params=budget)
    back = from_record(OPEN, json.loads(json.dumps(to_record(plan), allow_nan=False)), budget=True)
    assert back == plan and back.rows() == plan.rows() and "risk" in plan.rows()[0]


def test_ranks_whose_worth_is_not_known_come_back_without_it():
    plan = lr.plan(nn.Dense(16), jnp.ones((2, 20)), [lr.Rule(".*kernel", scale=0.25)])
    record = to_record(plan)
    assert record["worth"] == {}
    for known in (record, {"ranks": record["ranks"]}):
        assert from_record(plan, known, budget=True).rows() == plan.rows()


@pytest.mark.parametrize(
    ("worth", "message"),
    [
        ([], "the worth of other kernels"),
        ({"layers_4/kernel": {"risk": 0.1, "next_gain": None}}, "the worth of other kernels"),
        ({"layers_0/kernel": 0.1}, "the worth of layers_0/kernel is no risk and next_gain"),
        ({"layers_0/kernel": {"risk": 0.1}}, "no risk and next_gain"),
        ({"layers_0/kernel": {"risk": None, "next_gain": None}}, "no numbers"),
        ({"layers_0/kernel": {"risk": 0.1, "next_gain": "x"}}, "no numbers"),
    ],
)
def test_a_worth_that_is_none_is_refused(worth, message):
    record = to_record(lr.allocate(OPEN, params=0.4))
    with pytest.raises(ValueError, match=message):
        from_record(OPEN, {**record, "worth": worth}, budget=True)


@pytest.mark.parametrize("value", ["x" * 10_000, [7] * 10_000])
@pytest.mark.parametrize(("key", "message"), [("rank", "have rank"), ("rows", "have the rows"), ("execution", "run")])
def test_a_long_value_is_cut_short_in_the_message(key, message, value):
    record = to_record(lr.allocate(OPEN, params=0.4))
    record["ranks"]["layers_0/kernel"][key] = value
    with pytest.raises(ValueError, match=f"^layers_0/kernel cannot {message} .* characters\\)$") as caught:
        from_record(OPEN, record, budget=True)
    assert len(str(caught.value)) < 300
