import jax.numpy as jnp
import pytest

from lowrank_jax.kernel import LowRankKernel, is_low_rank
from lowrank_jax.paths import first_match, map_named, named_leaves

NAMES = ["stem/conv/kernel", "stage1/block1/conv1/kernel", "head/kernel", "head/bias"]


def test_leaves_are_named_by_their_path():
    tree = {"b": {"kernel": LowRankKernel(jnp.ones((2, 1)), jnp.ones((1, 2)))}, "a": [jnp.ones(3)]}
    assert list(named_leaves(tree)) == ["a/0", "b/kernel/u", "b/kernel/v"]
    assert list(named_leaves(tree, is_leaf=is_low_rank)) == ["a/0", "b/kernel"]
    assert map_named(lambda name, _: name, tree)["a"] == ["a/0"]


def test_the_first_full_match_wins():
    matches = first_match(["head/kernel", ".*/kernel"], NAMES)
    assert matches == {"stem/conv/kernel": 1, "stage1/block1/conv1/kernel": 1, "head/kernel": 0, "head/bias": None}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["stem/conv"], "rule 'stem/conv' matches no parameter; the nearest is 'stem/conv/kernel'"),
        ([".*", "head/kernel"], "rule 'head/kernel' never applies: earlier rules"),
        (["(head"], "is not a regular expression"),
    ],
)
def test_a_rule_that_decides_nothing_is_an_error(patterns, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        first_match(patterns, NAMES)


def test_a_catch_all_may_catch_nothing():
    assert first_match([".*/kernel", ".*"], ["a/kernel"]) == {"a/kernel": 0}
