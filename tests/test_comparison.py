"""Comparing batches that are filled up, and runs whose layers differ, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from lowrank_jax.comparison import Run, Totals, common, compare, divergences, misfits

RNG = np.random.default_rng(0)


def run(layers=None, rows=4):
    logits = RNG.standard_normal((rows, 3)).astype(np.float32)
    return Run((logits,), np.log(softmax(logits, axis=1)), layers or {})


def relative(dense, low):
    return np.linalg.norm(low - dense) / np.linalg.norm(dense)


def test_what_fills_up_a_batch_counts_nothing_not_even_where_it_is_no_number():
    """Layers have the axis of examples last but one, behind those of a stack."""
    dense, low = (
        run({"a": tuple(RNG.standard_normal((4, 5)) for _ in range(2)), "b": (RNG.standard_normal((3, 4, 2)),)}) for _ in "ab"
    )
    mask = np.asarray([1, 0, 1, 0], np.float32)
    for one in (dense, low):
        one.outputs[0][1] = one.predictions[1] = one.layers["a"][1][3] = np.nan
        one.layers["b"][0][:, 1] = np.inf if one is dense else np.nan
    totals = Totals()
    totals.add(jax.device_get(compare(dense, low, mask)), mask > 0)
    found = totals.fidelity(["b", "a"], {})
    seen = [0, 2]
    p, q = (softmax(one.outputs[0][seen], axis=1) for one in (dense, low))
    np.testing.assert_allclose(found.divergences, rel_entr(p, q).sum(1), rtol=1e-5)
    assert found.examples == 2 and found.logits_error == pytest.approx(relative(dense.outputs[0][seen], low.outputs[0][seen]))
    uses = [np.stack([array[seen] for array in one.layers["a"]]) for one in (dense, low)]
    stacks = [one.layers["b"][0][:, seen] for one in (dense, low)]
    assert list(found.layers) == ["b", "a"]
    assert found.layers == pytest.approx({"a": relative(*uses), "b": relative(*stacks)}, rel=1e-5)


def test_totals_over_batches_are_those_of_all_examples_at_once():
    """No mean of means: the batches are of different sizes and scales."""
    parts = [(run(rows=rows), run(rows=rows)) for rows in (2, 7, 1)]
    parts = [
        tuple(r._replace(layers={"a": (scale * r.outputs[0],)}) for r in pair)
        for scale, pair in zip((1, 9, 50), parts, strict=True)
    ]
    totals = Totals()
    for dense, low in parts:
        totals.add(compare(dense, low), np.ones(len(dense.outputs[0]), bool))
    found = totals.fidelity(["a"], {})
    joined = [np.concatenate([pair[place].layers["a"][0] for pair in parts]) for place in (0, 1)]
    assert found.examples == 10 and found.layers["a"] == pytest.approx(relative(*joined), rel=1e-5)
    assert found.kl == pytest.approx(found.divergences.mean()) and len(found.divergences) == 10


def test_layers_that_do_not_match_are_named_and_left_out():
    ones = jnp.ones
    dense = run({"same": (ones((1, 2)),), "twice": (ones((1, 2)),) * 2, "wide": (ones((1, 2)),), "mine": (ones((1, 2)),)})
    low = run({"same": (ones((1, 2)),), "twice": (ones((1, 2)),), "wide": (ones((1, 3)),)})
    assert misfits(dense, low) == {
        "twice": "its layer returns 2 arrays in one network and 1 in the other",
        "wide": "its layer's outputs have other shapes in the other network",
    }
    for one in common(dense, low):
        assert list(one.layers) == ["same"]


@given(st.lists(st.tuples(st.floats(-30, 30, width=32), st.floats(-30, 30, width=32)), min_size=1, max_size=5))
def test_a_divergence_is_scipys_and_never_negative(pairs):
    one, other = (np.asarray(logits, np.float32) for logits in zip(*pairs, strict=True))
    found = float(divergences(jax.nn.log_softmax(one), jax.nn.log_softmax(other)))
    expected = rel_entr(softmax(one.astype(np.float64)), softmax(other.astype(np.float64))).sum()
    assert found >= 0 and found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_divergence_of_nearly_equal_predictions_is_not_lost_in_rounding():
    """A sum of p log(p / q) in float32 has an error of 1e-7."""
    p = np.asarray([0.2, 0.3, 0.5])
    q = p + 1e-5 * np.asarray([1, 1, -2])
    found = float(
        divergences(
            jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(p, jnp.float32)) + jnp.asarray(np.log(q / p), jnp.float32)
        )
    )
    assert found == pytest.approx(rel_entr(p, q).sum(), rel=0.02)
