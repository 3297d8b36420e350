"""Whatever a config says is accepted or refused in one way, at once."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict, config_dict

from lowrank_jax.experiment.config import parse, relations
from lowrank_jax.experiment.config.files import ConfigError, default, legal_keys, to_dict

LARGE = 2**70


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Unwritable:
    def __repr__(self):
        raise RuntimeError("no text")

    __str__ = __repr__


def itself():
    value = {}
    value["again"] = value
    return value


HOSTILE = {
    "true": True, "none": None, "zero": 0, "minus": -1, "one": 1, "large": LARGE, "small": -LARGE, "digits": 10**5000,
    "inf": float("inf"), "minus inf": float("-inf"), "nan": float("nan"), "1e308": 1e308, "1e-320": 1e-320, "2^31": 2**31,
    "2^63": 2**63 - 1, "half": 0.5, "empty": "", "long": "x" * 10_000, "digits as text": "9" * 10_000, "colon": ":",
    "code": "a:b", "no module": "no.such.module:x", "null": "\0", "surrogate": "\udcff", "lines": "a\nb", "list": [],
    "tuple": (), "mapping": {}, "number keys": {5: 3}, "mapping of all": {"path": ".*", "x": [{}]}, "lists": [[]],
    "deep": nested(100), "very deep": nested(100_000), "itself": itself(), "set": {1}, "bytes": b"x", "complex": 1j,
    "type": int, "function": len, "array": np.zeros(3), "numpy": np.float32(0.1), "numpy int": np.int64(3),
    "large in it": [LARGE], "nan in it": (float("nan"), 1), "mappings": ({"path": 5},), "unwritable": Unwritable(),
    "rule": ({"path": "(.*)*(.*)*x", "rank": LARGE},), "pairs": ((".*", 1e308),), "pair": (("(a", 1.0),),
    "spec": ({"path": ".*", "spec": (5,)},), "names": ("a", "a"), "durations": ("1e17 steps",), "duration": "1e17 steps",
    "split": "train[:0%]", "brackets": "train[[[", "section": ConfigDict({"x": 1}), "reference": config_dict.FieldReference(3),
    "placeholder": config_dict.required_placeholder(int),
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    """A small network, whose plan is known at once."""
    config = default()
    config.steps = 100
    config.model.name = "mlp"
    config.model.kwargs.widths = (8,)
    config.model.kwargs.dropout = 0.0
    return to_dict(parse(config))


def put(values, key, value):
    """A copy of nested mappings with one value changed."""
    first, _, rest = key.partition(".")
    return {**values, first: put(values[first], rest, value) if rest else value}


EXTRA = (
    "model.kwargs.widths", "model.kwargs.dropout", "model.kwargs.other", "dataset.kwargs.other", "seed.x", "nothing", "optim",
    "model.kwargs", "dataset", "mesh",
)  # fmt: skip


@pytest.mark.parametrize("key", [*legal_keys(), *EXTRA])
def test_every_value_of_every_key_is_accepted_or_refused_in_one_message(key, base, monkeypatch):
    if not key.startswith(("model", "lowrank", "dataset.kwargs", "dataset.name")):
        monkeypatch.setattr(relations, "check_plan", lambda config: None)  # it depends on none of the others
    for name, value in HOSTILE.items():
        values = put(base, key, value) if key != "seed.x" else {**base, "seed": {"x": value}}
        try:
            text = json.dumps(to_dict(parse(values, devices=1)), allow_nan=False)
        except ConfigError as error:
            assert all(len(problem.splitlines()) == 1 and len(problem) < 10_000 for problem in error.problems), (name, error)
        else:
            assert json.loads(text), name
