"""Trees as dicts of arrays: through files and through what walks over parameters."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from clu import parameter_overview
from flax import serialization

import lowrank_jax as lr
from lowrank_jax.kernel import dense_view, is_low_rank

X = jnp.ones((2, 8, 8, 3))
KEY = jax.random.key(0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(16, name="dense")(x), None


class Net(nn.Module):
    """A convolution in the spatial scheme, a stack of dense layers, and a kernel that stays dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(x)).mean((1, 2))
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks(name="blocks")(x, None)
        return nn.DenseGeneral((2, 4), name="head")(x)


RULES = [
    lr.Rule("conv/kernel", rank=3, scheme="spatial", execution="merged"),
    lr.Rule("blocks/.*", rank=2),
    lr.Rule("head/.*"),
]


@pytest.fixture(scope="module")
def plan():
    return lr.plan(Net(), X, RULES)


@pytest.fixture(scope="module")
def params(plan):
    return lr.factorize(jax.jit(Net().init)(KEY, X)["params"], plan, key=KEY)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_names_are_those_of_the_parameters_and_of_their_factors(params):
    arrays = lr.flatten(params)
    assert set(arrays) == {
        *("conv/kernel/u", "conv/kernel/v", "conv/bias", "head/kernel", "head/bias"),
        *("blocks/dense/kernel/u", "blocks/dense/kernel/v", "blocks/dense/bias"),
    }
    assert arrays["blocks/dense/kernel/u"] is params["blocks"]["dense"]["kernel"].u
    assert lr.flatten(arrays) == arrays


def test_a_tree_comes_back_by_its_plan_and_by_a_tree_like_it(params, plan):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params)
    for tree in (params, half, jax.eval_shape(lambda: params)):
        arrays = lr.flatten(tree)
        for like in (plan, params, jax.eval_shape(lambda: params)):
            found = lr.unflatten(arrays, like)
            assert jax.tree.structure(found) == jax.tree.structure(params)
            assert all(one is other for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True))
    assert_same(lr.unflatten(lr.flatten({"params": params}), plan), {"params": params})


def test_safetensors(params, plan, tmp_path):
    safetensors = pytest.importorskip("safetensors.flax")
    safetensors.save_file(lr.flatten(params), tmp_path / "model.safetensors")
    assert_same(lr.unflatten(safetensors.load_file(tmp_path / "model.safetensors"), plan), params)


def test_bytes_without_a_target_come_back_by_the_plan(params, plan):
    restored = serialization.msgpack_restore(serialization.to_bytes(params))
    assert not any(map(is_low_rank, jax.tree.leaves(restored, is_leaf=is_low_rank)))
    assert_same(lr.unflatten(restored, plan), params)


def test_orbax_without_a_target_comes_back_by_the_plan_or_by_shapes(params, plan, tmp_path):
    state = {"params": params, "opt_state": optax.adamw(0.1).init(params), "step": jnp.asarray(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step")
    assert_same(lr.unflatten(restored["params"], plan), params)
    assert_same(lr.unflatten(restored, jax.eval_shape(lambda: state)), state)
    assert is_low_rank(lr.unflatten(restored, plan)["opt_state"]["0"]["mu"]["conv"]["kernel"])


def test_boxes_come_off_and_back(params):
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, ("data",) * x.ndim), params)
    assert_same(lr.flatten(boxed), lr.flatten(params))
    assert_same(lr.unflatten(lr.flatten(params), boxed), boxed)
    assert_same(lr.unflatten(serialization.to_state_dict(boxed), boxed), boxed)  # as dicts of a value


def test_what_does_not_fit_is_told_at_once(params, plan):
    arrays = lr.flatten(params)
    del arrays["conv/kernel/v"], arrays["head/bias"]
    arrays["head/kernel"] = arrays["head/kernel"][0]
    arrays["other"] = arrays["conv/bias"]
    with pytest.raises(ValueError) as error:
        lr.unflatten(arrays, params)
    for problem in ("conv/kernel/v: missing", "head/bias: missing", "head/kernel: has shape [2, 4], in", "other: not in"):
        assert problem in str(error.value)
    with pytest.raises(ValueError, match="conv/kernel: the plan factors it, and there are no conv/kernel/u"):
        lr.unflatten(arrays, plan)


def test_arrays_of_other_shapes_are_refused(params, plan):
    arrays = lr.flatten(params)
    turned = {**arrays, "head/kernel": arrays["head/kernel"].T}
    shorter = {**arrays, "conv/kernel/v": arrays["conv/kernel/v"][..., :8]}
    without = {name: array for name, array in arrays.items() if name != "head/kernel"}
    for like in (plan, params):
        for given, problem in ((turned, "head/kernel: has shape"), (shorter, "conv/kernel"), (without, "head/kernel: ")):
            with pytest.raises(ValueError, match=problem):
                lr.unflatten(given, like)
    longer = jax.tree.map(lambda pair: pair, params)
    pair = params["conv"]["kernel"]
    longer["conv"]["kernel"] = dataclasses.replace(pair, u=pair.u[..., :2], v=pair.v[:2])
    assert lr.unflatten(lr.flatten(longer), params)["conv"]["kernel"].rank == 2  # ranks may be others


def test_factors_of_other_rows_than_planned_are_refused(params):
    channel = lr.plan(Net(), X, [lr.Rule("conv/kernel", rank=3)])
    with pytest.raises(
        ValueError, match=r"conv/kernel: has factors of shapes \[3, 3, 3\] and .* are \[3, 3, 3, 3\] and \[3, 16\]"
    ):
        lr.unflatten(lr.flatten(params), channel)


def test_one_name_for_two_arrays_is_refused():
    with pytest.raises(ValueError, match="two arrays are called 'a/b'"):
        lr.flatten({"a": {"b": 1}, "a/b": 2})


def test_an_overview_of_flat_parameters_counts_what_is_stored(params, plan):
    for tree in (lr.flatten(params), serialization.to_state_dict(params)):
        assert parameter_overview.count_parameters(tree) == plan.params
        assert "conv/kernel/u" in parameter_overview.get_parameter_overview(tree)


def traverse_with_names(tree):
    """As big_vision walks over parameters."""
    if dataclasses.is_dataclass(tree):
        tree = serialization.to_state_dict(tree)
    if isinstance(tree, dict):
        for key in sorted(tree):
            for path, value in traverse_with_names(tree[key]):
                yield f"{key}/{path}".rstrip("/"), value
    else:
        yield "", tree


def test_walks_by_state_dicts_see_the_leaves_that_jax_sees(params):
    leaves, structure = jax.tree.flatten(params)
    names, places = zip(*traverse_with_names(structure.unflatten(range(len(leaves)))), strict=True)
    by_name = {name: leaves[place] for name, place in zip(names, places, strict=True)}
    assert_same(by_name, lr.flatten(params))


def test_optax_masks_and_utilities_take_pairs(params):
    pair = dense_view((4, 3)).from_factors(np.ones((4, 1), np.float32), np.ones((1, 3), np.float32))
    tree = {"kernel": pair, "bias": jnp.ones(3)}
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, tree, is_leaf=is_low_rank)
    optimizer = optax.masked(optax.sgd(1.0), mask)
    state = optimizer.init(tree)
    assert repr(optax.masked(optax.adam(1.0), jax.tree.map(lambda m: not m, mask)).init(tree))  # with MaskedNodes for factors
    updates, _ = optimizer.update(tree, state, tree)
    np.testing.assert_array_equal(updates["kernel"].u, -pair.u)
    np.testing.assert_array_equal(updates["bias"], tree["bias"])
    norm = np.sqrt(sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(optax.tree.norm(tree), norm, rtol=1e-6)
    assert optax.tree.size(tree) == 4 + 3 + 3
    assert_same(optax.tree.cast(tree, jnp.bfloat16)["kernel"], pair.astype(jnp.bfloat16))
    zeros = optax.tree.zeros_like(params)
    assert jax.tree.structure(zeros) == jax.tree.structure(params)


def test_keys_with_slashes_come_back_by_a_tree_alone():
    model, x = nn.WeightNorm(nn.Dense(8)), jnp.ones((2, 12))
    params = model.init(jax.random.key(0), x)["params"]
    made = lr.plan(model, x, [lr.Rule(".*kernel", rank=2)])
    low = lr.factorize(params, made, key=jax.random.key(1))
    back = lr.unflatten(lr.flatten(low), jax.eval_shape(lambda: low))
    assert jax.tree.structure(back) == jax.tree.structure(low)
    with pytest.raises(ValueError, match=r"the model has the key '.*/.*': names do not tell it from a path; give a tree"):
        lr.unflatten(lr.flatten(low), made)
