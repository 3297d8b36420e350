"""What is no Linen module is told so, with what to pass instead."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lr

X = np.ones((2, 4), np.float32)
PLAN = lr.plan(nn.Dense(3), X, [])


class Wrapper:
    """As Hugging Face's models are: not a module, and with one inside."""

    module = nn.Dense(3)


TAKERS = [
    lambda model: lr.plan(model, X, []),
    lambda model: lr.apply(model, {"params": {}}, X),
    lambda model: lr.inputs.second_moments(model, {"params": {}}, [X], PLAN),
    lambda model: lr.inputs.samples(model, {"params": {}}, [X], PLAN, key=jax.random.key(0)),
]


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nnx.Linear(4, 3, rngs=nnx.Rngs(0)), "Linear is one of flax.nnx, and flax.nnx modules are not taken yet"),
        (nnx.Linear, "flax.nnx modules are not taken yet"),
        (nn.Dense, r"Dense is a class: pass an instance, Dense\(...\)"),
        (Wrapper(), "this Wrapper has it inside: pass model.module"),
        (lambda x: x, "takes a flax.linen module; not function"),
        (dict, "not the class dict"),
        (None, "not NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_is_told_what_to_pass(take, model, message):
    with pytest.raises(TypeError, match=message):
        take(model)


@pytest.mark.parametrize("rules", [[{"path": ".*"}], "abc", lr.Rule(".*"), None])
def test_rules_are_rules(rules):
    with pytest.raises(TypeError, match=r"rules takes a list of lowrank_jax\.Rule"):
        lr.plan(nn.Dense(4), np.ones((2, 4), np.float32), rules)
