"""Parameters in boxes that say how they are partitioned, through everything that the library does with parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen.spmd import logical_to_mesh_sharding
from jax.sharding import AxisType, PartitionSpec

import lowrank_jax as lr
from lowrank_jax.kernel import LowRankKernel, dense_view, is_low_rank
from lowrank_jax.linen import boxes

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((4, 8, 8, 4)).astype(np.float32)
BOXES = {"partitioned": nn.with_partitioning, "logical": nn.with_logical_partitioning}


class Block(nn.Module):
    boxed: str

    @nn.compact
    def __call__(self, x, _):
        kernel_init = BOXES[self.boxed](nn.initializers.lecun_normal(), ("model", "data"))
        return nn.relu(nn.Dense(16, kernel_init=kernel_init, name="dense")(x)), None


class Net(nn.Module):
    """A convolution, a stack of dense layers, a layer with several axes and one that stays dense."""

    boxed: str = "partitioned"

    @nn.compact
    def __call__(self, x):
        box, init = BOXES[self.boxed], nn.initializers.lecun_normal()
        bias_init = box(nn.initializers.ones, ("data",))
        conv_init = box(init, (None, "height", "model", "data"))
        x = nn.relu(nn.Conv(16, (3, 3), kernel_init=conv_init, bias_init=bias_init, name="conv")(x)).mean((1, 2))
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        blocks = nn.scan(Block, **axes, length=3, metadata_params={nn.PARTITION_NAME: "layers"})
        x, _ = blocks(self.boxed, name="blocks")(x, None)
        x = nn.DenseGeneral((4, 4), kernel_init=box(init, ("model", "heads", None)), name="heads")(x)
        return nn.DenseGeneral(4, axis=(-2, -1), kernel_init=box(init, ("heads", None, "data")), name="out")(x)


RULES = [lr.Rule("conv/kernel", rank=3, scheme="spatial"), lr.Rule("out/.*"), lr.Rule(".*kernel", rank=2)]


def made(boxed="partitioned", rules=RULES):
    """The model, its boxed dense parameters, a plan and its factored parameters."""
    model = Net(boxed)
    params = jax.jit(model.init)(KEY, X)["params"]
    plan = lr.plan(model, X, rules)
    return model, params, plan, lr.factorize(params, plan, key=KEY)


def assert_close(found, expected, **tolerances):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **tolerances)


@pytest.mark.parametrize(("boxed", "kind"), [("partitioned", nn.Partitioned), ("logical", nn.LogicallyPartitioned)])
def test_factors_have_the_names_of_their_axes_and_none_for_the_rank(boxed, kind):
    _, dense, _, params = made(boxed)
    spec, whole = nn.get_partition_spec(params), PartitionSpec()
    assert spec["conv"]["kernel"] == LowRankKernel(
        PartitionSpec(None, "model", None), PartitionSpec(None, "height", "data"), (0, 2)
    )
    assert spec["blocks"]["dense"]["kernel"] == LowRankKernel(
        PartitionSpec("layers", "model", None), PartitionSpec("layers", None, "data")
    )
    assert spec["heads"]["kernel"] == LowRankKernel(PartitionSpec("model", None), PartitionSpec(None, "heads", None))
    assert spec["out"]["kernel"] == nn.get_partition_spec(dense)["out"]["kernel"] == PartitionSpec("heads", None, "data")
    assert spec["conv"]["bias"] == PartitionSpec("data") and spec["heads"]["bias"] == whole
    assert all(type(box) is kind for box in (params["conv"]["kernel"].u, params["conv"]["kernel"].v, params["conv"]["bias"]))


def test_values_are_those_without_boxes():
    _, dense, plan, params = made()
    assert_close(nn.meta.unbox(params), lr.factorize(nn.meta.unbox(dense), plan, key=KEY), rtol=1e-6)


@pytest.mark.parametrize("boxed", BOXES)
def test_merging_gives_the_dense_boxes_back(boxed):
    _, dense, _, params = made(boxed)
    merged = lr.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(dense)
    assert_close(nn.meta.unbox(merged), lr.merge(nn.meta.unbox(params)), rtol=1e-6)


@pytest.mark.parametrize("execution", ["factored", "merged", "premerged"])
def test_models_run_on_boxed_factors(execution):
    model, _, _, params = made()
    params = jax.tree.map(
        lambda leaf: LowRankKernel(leaf.u, leaf.v, leaf.rows, execution) if is_low_rank(leaf) else leaf,
        params,
        is_leaf=is_low_rank,
    )
    expected = jax.jit(model.apply)({"params": lr.merge(nn.meta.unbox(params))}, X)
    found = jax.jit(lambda params: lr.apply(model, {"params": params}, X))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with lr.factored():
        np.testing.assert_allclose(model.apply({"params": params}, X), expected, rtol=1e-4, atol=1e-5)


def test_on_a_mesh_every_factor_lies_as_its_box_says():
    # Of nn.DenseGeneral, flax constrains a kernel of two axes by three names; on factors it does not come to that.
    model, _, _, params = made("logical", [RULES[0], RULES[2]])
    rules = (("layers", None), ("height", None), ("heads", "model"), ("model", "model"), ("data", "data"))
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    shardings = logical_to_mesh_sharding(nn.get_partition_spec(params), mesh, rules)
    laid = jax.device_put(nn.meta.unbox(params), shardings)
    parts = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in lr.flatten(laid).items()}
    assert (parts["conv/kernel/u"], parts["conv/kernel/v"]) == ((3, 2, 3), (3, 3, 8))
    assert (parts["blocks/dense/kernel/u"], parts["blocks/dense/kernel/v"]) == ((3, 8, 2), (3, 2, 8))
    assert parts["heads/kernel/v"] == (2, 2, 4)
    expected = lr.apply(model, {"params": params}, X)
    params = nn.meta.replace_boxed(params, laid)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        found = jax.jit(lambda params: lr.apply(model, {"params": params}, X))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_optimisers_and_penalties_take_boxes():
    model, _, _, params = made()
    plain = nn.meta.unbox(params)
    np.testing.assert_allclose(lr.frobenius_penalty(params), lr.frobenius_penalty(plain), rtol=1e-6)
    np.testing.assert_allclose(lr.nuclear_penalty(params), lr.nuclear_penalty(plain), rtol=1e-6)
    optimizer = optax.chain(lr.add_frobenius_decay(0.1), lr.add_nuclear_decay(0.01), optax.adamw(0.1))

    @jax.jit
    def step(params):
        grads = jax.grad(lambda params: jnp.sum(lr.apply(model, {"params": params}, X) ** 2))(params)
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    (found, state), (expected, _) = step(params), step(plain)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert_close(nn.meta.unbox(found), expected, rtol=1e-3, atol=1e-4)
    mu = nn.get_partition_spec(state)[2][0].mu
    assert mu["conv"]["kernel"] == nn.get_partition_spec(params)["conv"]["kernel"]


def test_moments_are_those_without_boxes():
    rules = [rule for rule in RULES if rule.path != ".*kernel"] + [lr.Rule("heads/kernel", rank=2)]
    model, dense, plan, params = made(rules=rules)
    for tree in (dense, params):
        found = lr.inputs.second_moments(model, {"params": tree}, [X], plan)
        expected = lr.inputs.second_moments(model, {"params": nn.meta.unbox(tree)}, [X], plan)
        assert set(found) == {"conv/kernel", "heads/kernel"}
        assert_close(found, expected, rtol=1e-5)
    aware = lr.factorize(dense, plan, key=KEY, moments=found)
    assert jax.tree.structure(aware) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("layer", "names", "spec"),
    [
        (lr.LowRankDense, ("model", "data"), (PartitionSpec("model", None), PartitionSpec(None, "data"))),
        (lr.LowRankConv, (None, "h", "model", "data"), (PartitionSpec(None, "h", "model", None), PartitionSpec(None, "data"))),
    ],
)
def test_drop_in_layers_keep_the_boxes_of_their_initialisers(layer, names, spec):
    settings = {} if layer is lr.LowRankDense else {"kernel_size": (3, 3)}
    init = nn.initializers.lecun_normal()
    plain = layer(8, rank=2, **settings)
    boxed = plain.clone(
        kernel_init=nn.with_partitioning(init, names), bias_init=nn.with_partitioning(plain.bias_init, ("data",))
    )
    params = boxed.init(KEY, X)["params"]
    kernel = nn.get_partition_spec(params)["kernel"]
    assert (kernel.u, kernel.v) == spec
    assert_close(nn.meta.unbox(params), plain.init(KEY, X)["params"], rtol=1e-6)
    np.testing.assert_allclose(boxed.apply({"params": params}, X), plain.apply({"params": nn.meta.unbox(params)}, X), rtol=1e-6)


class Tagged(nn.meta.AxisMetadata):
    """A box of somebody else, which says nothing of axes."""

    def __init__(self, value, tag):
        self.value, self.tag = value, tag

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return Tagged(val, self.tag)

    def add_axis(self, index, params):
        return self

    remove_axis = add_axis


jax.tree_util.register_pytree_node(Tagged, lambda box: ((box.value,), box.tag), lambda tag, values: Tagged(*values, tag))


def test_boxes_of_other_classes_go_with_both_factors_and_come_back():
    pair = dense_view((4, 3)).from_factors(np.ones((4, 1), np.float32), np.ones((1, 3), np.float32))
    boxed = boxes.like(Tagged(np.ones((4, 3)), "mine"), pair)
    assert boxed.u.tag == boxed.v.tag == boxes.merged(boxed).tag == "mine"
    assert boxed.shape == (4, 3) and repr(boxed) == repr(pair)
    np.testing.assert_array_equal(boxes.merged(boxed).value, np.ones((4, 3)))


def test_names_that_leave_the_last_axes_out_mean_none():
    pair = dense_view((4, 3)).from_factors(np.ones((4, 1), np.float32), np.ones((1, 3), np.float32))
    boxed = boxes.like(nn.Partitioned(np.ones((4, 3)), ("model",)), pair)
    assert (boxed.u.names, boxed.v.names) == (("model", None), (None, None))
