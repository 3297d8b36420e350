"""Which kernels are found to be followed by a normalisation, and which are not."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax import models

RULES = [lr.Rule(".*kernel", scale=1.0)]
IMAGES, ROWS = jnp.ones((2, 6, 6, 3)), jnp.ones((4, 5))


def found(model, x, also=(), **kwargs):
    """By the name of the layer what follows it."""
    plan = lr.plan(model, x, RULES, also=also, **kwargs)
    return {kernel.name.removesuffix("/kernel"): kernel.normalized for kernel in plan.kernels if kernel.name.endswith("kernel")}


class Then(nn.Module):
    """A layer, something and a normalisation."""

    layer: Any
    norm: Any
    between: Any = None

    @nn.compact
    def __call__(self, x):
        y = self.layer()(x)
        if self.between is not None:
            y = self.between(y, x)
        return nn.relu(self.norm()(y))


CONV, DENSE = functools.partial(nn.Conv, 8, (3, 3), name="layer"), functools.partial(nn.Dense, 8, name="layer")
LAYERS = {"conv": (CONV, IMAGES), "dense": (DENSE, ROWS)}
TRAINED, EVALUATED = (functools.partial(nn.BatchNorm, use_running_average=flag) for flag in (False, True))


class MeanSquare(nn.Module):
    """As it is written by hand, with a scale that starts at zero."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (TRAINED, "each"),
        (EVALUATED, "each"),
        (functools.partial(EVALUATED, use_scale=False, use_bias=False), "each"),
        (functools.partial(TRAINED, use_fast_variance=False, dtype=jnp.bfloat16), "each"),
        (functools.partial(EVALUATED, axis_name="devices"), "each"),
        (functools.partial(nn.GroupNorm, num_groups=None, group_size=1), "each"),
        (functools.partial(nn.GroupNorm, 4), "together"),
        (functools.partial(nn.GroupNorm, 1), "together"),
        (nn.LayerNorm, "together"),
        (functools.partial(nn.LayerNorm, use_fast_variance=False), "together"),
        (nn.RMSNorm, "together"),
        (MeanSquare, "together"),
        (lambda: lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), "together"),
        (lambda: functools.partial(jax.nn.standardize, axis=0), "each"),
        (lambda: jax.nn.standardize, "together"),
        (lambda: lambda x: x, None),
        (lambda: lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6), "together"),
        (lambda: lambda x: x * jnp.minimum(1e6, 1 / jnp.linalg.norm(x, axis=-1, keepdims=True)), "together"),
        (lambda: lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.mean(x**2, axis=0) - x.mean(axis=0) ** 2, 0) + 1e-3), "each"),
        (lambda: lambda x: x * jax.lax.rsqrt(1 + x**2), None),
        (lambda: lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, axis=0) + 1e6), None),
        (lambda: lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, axis=0) + jnp.full(8, 1e6)), None),
        (lambda: lambda x: x * jax.lax.rsqrt(jnp.mean(x**2 + 1e6, axis=0)), None),
        (lambda: lambda x: x / (1 + jnp.linalg.norm(x, axis=-1, keepdims=True)), None),
        (lambda: lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1), None),
        (lambda: lambda x: x * jnp.minimum(1, 1 / jnp.linalg.norm(x, axis=-1, keepdims=True)), None),
        (lambda: lambda x: x / x.mean(axis=0), None),
        (lambda: lambda x: x / jnp.sqrt(x.mean(axis=0) ** 2 + 1e-6), None),
        (lambda: lambda x: x - x.mean(axis=0), None),
        (lambda: jax.nn.softmax, None),
    ],
)
def test_every_kind_of_normalisation(layer, norm, expected):
    made, x = LAYERS[layer]
    assert found(Then(made, norm), x) == {"layer": expected}


class Stored(nn.Module):
    """Divided by the root of what is stored."""

    collection: str
    shape: tuple[int, ...]
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8, name="layer")(x)
        stored = self.variable(self.collection, "var", jnp.ones, self.shape)
        return jnp.tanh(y / jnp.sqrt(stored.value + self.eps))


def test_only_statistics_that_are_stored_as_such_normalise():
    assert found(Stored("batch_stats", (8,)), ROWS) == {"layer": "each"}
    assert found(Stored("batch_stats", (8,), 1e6), ROWS) == {"layer": None}
    for shape in ((), (8,)):
        assert found(Stored("state", shape), ROWS) == {"layer": None}


def test_statistics_of_every_image_and_channel():
    assert found(Then(CONV, nn.InstanceNorm), IMAGES) == {"layer": "each"}


@pytest.mark.parametrize("norm", [TRAINED, EVALUATED, nn.LayerNorm])
@pytest.mark.parametrize(
    ("between", "kept"),
    [
        (lambda y, x: nn.relu(y), False),
        (lambda y, x: y + nn.Dense(8, name="other")(x), False),
        (lambda y, x: y + jnp.pad(x, ((0, 0), (0, 3))), False),
        (lambda y, x: y * nn.sigmoid(nn.Dense(8, name="other")(x)), False),
        (lambda y, x: nn.Dropout(0.5, deterministic=False)(y, rng=jax.random.key(0)), False),
        (lambda y, x: y[:, :4], False),
        (lambda y, x: nn.Dropout(0.5, deterministic=True)(y), True),
        (lambda y, x: 2 * y.astype(jnp.bfloat16), True),
        (lambda y, x: jnp.transpose(jnp.transpose(y)), True),
        (lambda y, x: nn.Module.param(nn.module._context.module_stack[-1], "bias", nn.initializers.zeros, (8,)) + y, True),
    ],
)
def test_what_may_stand_between(norm, between, kept):
    assert (found(Then(DENSE, norm, between), ROWS)["layer"] is not None) == kept


class Twice(nn.Module):
    """An output that something besides its normalisation reads."""

    reader: Any

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8, name="layer")(x)
        return nn.LayerNorm()(y), self.reader(y)


@pytest.mark.parametrize("reader", [nn.relu, lambda y: y, lambda y: y.mean(axis=0) @ jnp.ones((8, 2)), lambda y: y.max()])
def test_another_reader_means_no(reader):
    assert found(Twice(reader), ROWS) == {"layer": None}


def test_two_normalisations_of_one_output_are_as_good_as_one():
    assert found(Twice(nn.LayerNorm()), ROWS) == {"layer": "together"}


class Shared(nn.Module):
    """One layer used twice."""

    both: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5, name="layer")
        x = nn.relu(nn.LayerNorm()(layer(x)))
        x = layer(x)
        return nn.BatchNorm(use_running_average=True)(x) if self.both else nn.relu(x)


def test_all_uses_of_a_shared_layer_count():
    assert found(Shared(True), ROWS) == {"layer": "together"} and found(Shared(False), ROWS) == {"layer": None}


class Block(nn.Module):
    """A residual block; `pre`: normalised at its start, as in transformers, where a sum follows the last layer."""

    pre: bool

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(name="norm")(x) if self.pre else x
        y = nn.Dense(5, name="second")(nn.gelu(nn.RMSNorm(name="inner")(nn.Dense(9, name="first")(y))))
        return x + (y if self.pre else nn.LayerNorm(name="norm")(y)), None


class Stack(nn.Module):
    wrap: Any
    pre: bool

    @nn.compact
    def __call__(self, x):
        return self.wrap(Block)(self.pre, name="block")(x, None)[0]


WRAPS = {
    "plain": lambda block: block,
    "jit": nn.jit,
    "remat": nn.remat,
    "scan": lambda block: nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3),
    "remat in scan": lambda block: nn.scan(
        nn.remat(block, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    ),
    "vmap": lambda block: nn.vmap(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(None, None), axis_size=3
    ),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_blocks_in_loops_and_programs_of_their_own(wrap):
    assert found(Stack(WRAPS[wrap], pre=True), ROWS) == {"block/first": "together", "block/second": None}
    assert found(Stack(WRAPS[wrap], pre=False), ROWS) == {"block/first": "together", "block/second": "together"}


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(5, name="layer")(x))), None


@pytest.mark.parametrize("map_", [functools.partial(nn.scan, length=3), functools.partial(nn.vmap, axis_size=3)])
def test_stored_statistics_of_repeated_modules(map_):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            ins = {} if map_.func is nn.scan else {"in_axes": (None, None)}
            made = map_(Normed, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, **ins)
            return made(name="block")(x, None)[0]

    assert found(Model(), ROWS) == {"block/layer": "each"}


def test_attention_with_normalised_queries_and_keys():
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=8, normalize_qk=True)
    names = found(attention, jnp.ones((2, 4, 6)))
    assert names == {"query": "together", "key": "together", "value": None, "out": None}


class Called(nn.Module):
    """A normalised layer; in training its output is returned too, has other statistics, or another layer is there."""

    training: str

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(8, name="layer")(x)
        if self.training == "own":
            scale = self.param("var", nn.initializers.ones, (8,))
            return jax.nn.standardize(y, axis=0) if train else y * jax.lax.rsqrt(scale + 1e-5)
        if train and self.training == "together" and not self.is_initializing():
            return nn.LayerNorm(use_scale=False, use_bias=False)(y)
        z = nn.BatchNorm(use_running_average=not train)(y)
        if self.training == "more" and (train or self.is_initializing()):
            z = nn.BatchNorm(use_running_average=not train)(nn.Dense(8, name="more")(nn.relu(z)))
        return (z, jnp.tanh(y)) if train and self.training == "read" else z


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ("read", {"layer": None}),
        ("own", {"layer": None}),
        ("together", {"layer": "together"}),
        ("more", {"layer": "each", "more": "each"}),
        ("", {"layer": "each"}),
    ],
)
def test_all_calls_that_see_a_kernel_count(training, expected):
    """Of running statistics that the model keeps among its parameters nobody sees that they are statistics."""
    model, x = Called(training), ROWS
    assert found(model, x, also=[{"train": True}], train=False) == expected
    assert found(model, x, also=[{"train": False}], train=True) == expected


def test_a_kernel_that_something_changes_before_its_layer_counts_as_no():
    class Halved(nn.Module):
        @nn.compact
        def __call__(self, x):
            half = functools.partial(jax.tree.map, lambda leaf: leaf / jnp.sqrt(1 + jnp.sum(leaf**2)))
            y = nn.map_variables(nn.Dense, "params", half, init=self.is_initializing())(8, name="layer")(x)
            return nn.LayerNorm()(y)

    assert found(Halved(), ROWS) == {"layer": None}


@pytest.mark.parametrize("train", [False, True])
def test_resnet50(train):
    """Every convolution is followed by a BatchNorm; the head is not."""
    names = found(models.build("resnet50", num_classes=10), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32), train=train)
    assert names.pop("head") is None and len(names) == 53 and set(names.values()) == {"each"}


@pytest.mark.parametrize("train", [False, True])
def test_efficientnet(train):
    """All but the head and what squeeze-and-excitation is made of."""
    model = models.build("efficientnet_b0", num_classes=10)
    names = found(model, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32), train=train, rngs={"dropout": jax.random.key(0)})
    others = {name for name, kind in names.items() if kind is None and "depthwise" not in name}
    assert others == {"head"} | {name for name in names if "/se/" in name}
    assert sum(kind == "each" for kind in names.values()) >= 32


def test_vit():
    """Pre-norm: sums, an activation or attention follow its layers."""
    model = models.build("vit_s16", num_classes=10)
    assert set(found(model, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)).values()) == {None}


def test_the_rule_overrides_what_is_found():
    model, x = Then(DENSE, EVALUATED), jnp.ones((4, 40))
    risks = {}
    for said in (None, True, False):
        plan = lr.plan(model, x, [lr.Rule(".*kernel", scale=1.0, activation="silu", normalized=said)])
        variables = model.init(jax.random.key(0), x)
        made = lr.allocate(plan, params=0.3, variables=jax.tree.map(lambda leaf: 5 * leaf, variables))
        risks[said] = made.factored[0].risk
    assert risks[None] == risks[True] != risks[False]
