"""A dense guide beside a factor pair: what is computed, decayed and cut with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lowrank_jax.experiment.config.schema import OptimConfig
from lowrank_jax.experiment.guided import GuidedKernel, blended, names_in_rules, share_at, with_guides, without_guides
from lowrank_jax.experiment.hosts.sharding import ShardingRule, param_specs
from lowrank_jax.experiment.optim import make_optimizer
from lowrank_jax.kernel import LowRankKernel
from lowrank_jax.linen.factorize import merge

RNG = np.random.default_rng(0)
U, V, G, BIAS = (RNG.normal(size=shape).astype("f") for shape in ((8, 2), (2, 6), (8, 6), (6,)))
PAIRS = {"a": {"kernel": LowRankKernel(U, V), "bias": BIAS}}
GUIDED = {"a": {"kernel": GuidedKernel(U, V, guide=G), "bias": BIAS}}


def test_the_share_falls_on_a_cosine():
    shares = [float(share_at(jnp.int32(step), 8)) for step in (0, 2, 4, 8)]
    assert shares[0] == 1
    np.testing.assert_allclose(shares, [1, (2 + 2**0.5) / 4, 0.5, 0], atol=1e-6)


def test_a_guide_begins_as_the_product():
    begun = with_guides(PAIRS)
    np.testing.assert_array_equal(begun["a"]["kernel"].guide, merge(PAIRS)["a"]["kernel"])
    for share in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(blended(begun, jnp.float32(share))["a"]["kernel"], U @ V, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(blended(begun, jnp.float32(1))["a"]["kernel"], merge(PAIRS)["a"]["kernel"])


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2), (0, 2)])
def test_kernels_of_any_view_are_blended(rows):
    shape = (5, 4) if rows == (0,) else (3, 3, 5, 4)
    sizes = [shape[axis] for axis in rows], [size for axis, size in enumerate(shape) if axis not in rows]
    pair = LowRankKernel(jnp.ones((*sizes[0], 2)), jnp.ones((2, *sizes[1])), rows)
    guided = GuidedKernel(pair.u, pair.v, rows, guide=jnp.zeros(shape))
    np.testing.assert_allclose(guided.blend(jnp.float32(0.25)), np.full(shape, 1.5))


def test_without_guides_there_are_pairs_alone():
    pair = without_guides(GUIDED)["a"]["kernel"]
    assert type(pair) is LowRankKernel and pair.u is U and pair.v is V
    assert jax.tree.structure(without_guides(GUIDED)) == jax.tree.structure(PAIRS)


def test_rules_know_a_guide_by_the_name_of_its_kernel():
    assert names_in_rules(GUIDED) == {
        "a/kernel/u": "a/kernel/u",
        "a/kernel/v": "a/kernel/v",
        "a/kernel/guide": "a/kernel",
        "a/bias": "a/bias",
    }


def stepped(params=GUIDED, slope=0.0, **settings):
    """The parameters after a step with a rate of 1 along a gradient that is the same everywhere."""
    optimizer = make_optimizer(OptimConfig(momentum=0.0, nesterov=False, **settings), optax.constant_schedule(1.0), params)
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, slope), params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return optax.apply_updates(params, updates)["a"]


def assert_kernel(after, u, v, guide):
    for ours, theirs in zip((after["kernel"].u, after["kernel"].v, after["kernel"].guide), (u, v, guide), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after["bias"], BIAS)


def test_weight_decay_of_a_guide_is_the_kernels():
    assert_kernel(stepped(weight_decay=0.1), 0.9 * U, 0.9 * V, 0.9 * G)
    rules = ((".*/kernel", 0.5), (".*/[uv]", 2.0), (".*", 0.0))
    assert_kernel(stepped(weight_decay=0.1, decay_rules=rules), 0.8 * U, 0.8 * V, 0.95 * G)


def test_decay_of_the_product_is_the_pairs():
    frobenius = stepped(weight_decay=0.1, frobenius_decay=0.01)
    assert_kernel(frobenius, U - 0.01 * U @ (V @ V.T), V - 0.01 * (U.T @ U) @ V, 0.9 * G)
    assert_kernel(stepped(weight_decay=0.1, nuclear_decay=0.01), 0.99 * U, 0.99 * V, 0.9 * G)
    assert_kernel(stepped(nuclear_decay=0.01), 0.99 * U, 0.99 * V, G)


def test_trust_ratios_are_for_guides_too():
    after = stepped(slope=1.0, name="lamb")
    for new, old in ((after["kernel"].guide, G), (after["kernel"].u, U)):
        np.testing.assert_allclose(np.linalg.norm(new - old), np.linalg.norm(old), rtol=1e-4)


@pytest.mark.parametrize("rules", [(), (ShardingRule(".*kernel", (("fsdp",), ("model",))),)])
def test_a_guide_is_cut_as_the_dense_kernel_and_its_pair_as_ever(rules):
    sizes = {"data": 2, "fsdp": 2, "model": 2}
    specs = param_specs(GUIDED, sizes, rules)
    assert specs.pop("a/kernel/guide") == param_specs({"a": {"kernel": G}}, sizes, rules)["a/kernel"] != PartitionSpec()
    assert specs == param_specs(PAIRS, sizes, rules)
