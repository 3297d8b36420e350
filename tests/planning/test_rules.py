import pytest

from lowrank_jax.kernel import dense_view, spatial_view
from lowrank_jax.planning.rules import Rule, wanted_rank


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({}, None),
        ({"scale": 0.25}, 16),
        ({"scale": 0.1}, 6),
        ({"scale": 0.001}, 1),
        ({"rank": 5}, 5),
        ({"rank": 5, "multiple_of": 8}, 8),
        ({"scale": 0.26, "multiple_of": 8}, 24),
    ],
)
def test_the_rank_follows_from_scale_or_number(settings, rank):
    assert wanted_rank(Rule(".*", **settings), dense_view((64, 256))) == rank


def test_halves_round_up():
    assert wanted_rank(Rule(".*", scale=0.5), dense_view((5, 9))) == 3


def test_both_conventions_for_the_spatial_scheme():
    view = spatial_view((3, 3, 64, 128))  # a matrix of 192 x 384
    assert wanted_rank(Rule(".*", scale=0.1), view) == 19
    assert wanted_rank(Rule(".*", scale=0.1, scale_of="columns"), view) == 38  # round(0.1 * 128 * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.1, "rank": 3}, "both scale 0.1 and rank 3"),
        ({"scale": 0.0}, r"scale 0.0 must be in \(0, 1\]"),
        ({"scale": 1.5}, r"scale 1.5 must be in \(0, 1\]"),
        ({"scale": float("nan")}, "scale nan"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"rank": 2.5}, "rank 2.5 must be a whole number"),
        ({"rank": True}, "rank True must be a whole number"),
        ({"scale": "0.5"}, "scale '0.5' must be a number"),
        ({"rank": -2}, "rank -2 must be at least 1"),
        ({"multiple_of": 0}, "multiple_of 0"),
        ({"method": "spectrl"}, "unknown method 'spectrl'; did you mean spectral"),
        ({"activation": "rleu"}, "unknown activation 'rleu'; did you mean relu"),
        ({"scheme": "chanel"}, "unknown scheme 'chanel'; did you mean channel"),
        ({"scale_of": "rows"}, "unknown scale_of 'rows'"),
        ({"rows": ()}, "must be different axes"),
        ({"rows": (0, 0)}, "must be different axes"),
        ({"rows": ("x" * 10_000,)}, r"rows \('x{158} \.\.\. \(10005 characters\) must be different axes"),
        ({"normalized": "x" * 10_000}, r"normalized 'x{159} \.\.\. \(10002 characters\) must be True"),
        ({"rows": "all_but_first"}, "must be different axes"),
        ({"rows": (True,)}, "must be different axes"),
    ],
)
def test_a_bad_rule_says_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        Rule("a/kernel", **settings)
    with pytest.raises(ValueError, match="not a regular expression"):
        Rule("(a")
