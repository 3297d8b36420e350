"""Arguments that are nothing of their kind are refused by their names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.planning.arguments import moments_problem

X = jnp.ones((2, 12))
MODEL = nn.Dense(16)
PLAN = lr.plan(MODEL, X, [lr.Rule("kernel", scale=1.0)])
FACTORED = lr.plan(MODEL, X, [lr.Rule("kernel", rank=2)])
VARIABLES = {"params": {"kernel": jnp.ones((12, 16)), "bias": jnp.zeros(16)}}
KEY = jax.random.key(0)
V5E = lr.chips.CHIPS["v5e"]


def factorize(params=VARIABLES["params"], plan=FACTORED, key=KEY, **data):
    return lr.factorize(params, plan, key=key, **data)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lr.allocate(None, macs=0.5), "plan must be a lowrank_jax.Plan"),  # type: ignore[arg-type]
        (lambda: lr.rest_of_step(None, 1.0, V5E, batch=1), "plan must be a lowrank_jax.Plan"),  # type: ignore[arg-type]
        (lambda: lr.choose_execution(None, V5E, batch=1), "plan must be a lowrank_jax.Plan"),  # type: ignore[arg-type]
        (lambda: lr.sensitivity(MODEL, VARIABLES, [X], None), "plan must be a lowrank_jax.Plan"),  # type: ignore[arg-type]
        (lambda: factorize(plan=None), "plan must be a lowrank_jax.Plan"),
        (lambda: lr.inputs.second_moments(MODEL, VARIABLES, [X], None), "plan must be a"),  # type: ignore[arg-type]
        (lambda: lr.allocate(PLAN, macs=10**400), "macs=a whole number of 1329 bits must have at most 64 bits"),
        (lambda: lr.allocate(PLAN, bytes=0.5, itemsize=10**30), "itemsize .* must have at most 64 bits"),
        (lambda: lr.allocate(PLAN, macs=0.5, batch="x"), "batch 'x' must be a whole number"),  # type: ignore[arg-type]
        (lambda: lr.allocate(PLAN, seconds=0.5, chip=V5E, batch=1, rest=10**400), "rest .* must be a number of seconds"),
        (lambda: lr.allocate(PLAN, macs=0.5, sensitivity=3), "sensitivity must be a dict"),  # type: ignore[arg-type]
        (lambda: lr.allocate(PLAN, macs=0.5, sensitivity={"kernel": 1e308}), "sensitivity of 'kernel': .* at most 1e"),
        (lambda: lr.allocate(PLAN, macs=0.5, variables={"kernel": "x"}), "kernel: must be an array, not 'x'"),
        (lambda: lr.allocate(PLAN, macs=0.5, variables=VARIABLES, moments=[]), "moments must be a dict"),  # type: ignore[arg-type]
        (lambda: lr.rest_of_step(PLAN, 1.0, "v5e", batch=1), "chip must be one of"),  # type: ignore[arg-type]
        (lambda: lr.rest_of_step(PLAN, 1.0, V5E, batch=-4), "batch must be a whole number of at least 1, not -4"),
        (lambda: lr.rest_of_step(PLAN, 1.0, V5E, batch=1, itemsize=0), "itemsize must be a whole number of at least 1, not 0"),
        (lambda: lr.rest_of_step(PLAN, 10**400, V5E, batch=1), "must be seconds"),
        (lambda: factorize(key=None), "key must be a key of jax.random"),
        (lambda: factorize({"kernel": jnp.ones((12, 16), int), "bias": X}), "kernel: is int32, which cannot hold factors"),
        (lambda: factorize({"kernel": 3, "bias": X}), "kernel: must be an array, not 3"),
        (lambda: factorize(moments={"kernel": 3}), "kernel: moments: must be an array, not 3"),
        (lambda: lr.sensitivity(MODEL, VARIABLES["params"], [X], PLAN), 'variables must have "params"'),
        (lambda: lr.sensitivity(MODEL, VARIABLES, None, PLAN), "batches must be a list"),  # type: ignore[arg-type]
        (lambda: lr.sensitivity(MODEL, VARIABLES, [X], PLAN, logits=3), "logits must be a function"),  # type: ignore[arg-type]
        (lambda: lr.inputs.samples(MODEL, VARIABLES, [X], PLAN, key=KEY, per_batch=2.5), "per_batch 2.5 must be"),  # type: ignore[arg-type]
        (lambda: lr.plan(MODEL, X, [], also=[3]), "also takes a list of dicts"),  # type: ignore[list-item]
        (lambda: lr.plan(MODEL, X, [], rngs=3), "rngs takes a key"),
        (lambda: lr.Rule(".*", method=["x"]), "unknown method"),  # type: ignore[arg-type]
        (lambda: lr.Rule(".*", rank=10**5000), "rank a whole number of .* must have at most 64 bits"),
        (lambda: lr.chips.named(["x"]), "unknown chip"),  # type: ignore[arg-type]
        (lambda: lr.add_frobenius_decay("x"), "decay 'x' must be a number"),  # type: ignore[arg-type]
        (lambda: lr.add_nuclear_decay(-1), "decay -1 must be at least 0"),
        (lambda: lr.register_layer(nn.Embed, rows="x"), "must be axes of its kernel"),
        (lambda: lr.register_layer(nn.Embed, rows=1, run=3), "run must be a function"),  # type: ignore[arg-type]
        (lambda: lr.apply(MODEL, {"params": factorize()}), "Dense is called without its argument 'inputs'"),
    ],
)
def test_what_is_nothing_of_its_kind_is_refused_by_name(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (np.triu(np.ones((3, 3))), "must be symmetric"),
        (-np.eye(3), "must be positive semidefinite"),
        (np.full((3, 3), np.nan), "contain non-finite values"),
    ],
)
def test_what_are_no_second_moments_is_told(moment, message):
    assert message in (moments_problem(moment) or "")
    assert moments_problem(np.eye(3)) is None


def test_a_rule_takes_numbers_of_numpy_and_jax():
    assert lr.Rule(".*", scale=np.float32(0.5)) == lr.Rule(".*", scale=0.5)
    assert lr.Rule(".*", rank=np.int64(3)) == lr.Rule(".*", rank=3)
