"""Small networks built as well-known ones are: which of their kernels are factored, and that they compute the same then.

scripts/third_party_models.py counts the real ones.
"""

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.paths import named_leaves
from scripts.third_party_zoo import OPTIMIZED_LSTM_CELL

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((2, 8, 8, 3)).astype(np.float32)
SEQUENCE = RNG.standard_normal((2, 6, 12)).astype(np.float32)
TOKENS = RNG.integers(0, 16, (2, 6))


# As T5 in t5x: every product is a layer of its own, over several axes, and parameters carry the names of theirs.
class GeneralDense(nn.Module):
    features: tuple[int, ...]
    names: tuple[str, ...]
    axis: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, x):
        axes = tuple(axis % x.ndim for axis in self.axis)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.3), self.names)
        kernel = self.param("kernel", init, (*(x.shape[axis] for axis in axes), *self.features))
        return jax.lax.dot_general(x, kernel, ((axes, tuple(range(len(axes)))), ((), ())))


class NamedAxes(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(16, 12, name="tokens")
        x = table(tokens)
        q, k, v = (GeneralDense((3, 4), ("embed", "heads", "kv"), name=name)(nn.RMSNorm()(x)) for name in "qkv")
        bias = self.param("relative", nn.initializers.normal(), (3, tokens.shape[1], tokens.shape[1]))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + GeneralDense((12,), ("heads", "kv", "embed"), axis=(-2, -1), name="o")(mixed)
        x = x + GeneralDense((12,), ("mlp", "embed"), name="wo")(nn.gelu(GeneralDense((24,), ("embed", "mlp"), name="wi")(x)))
        return table.attend(x)


# As GPT-2 by Hugging Face: one kernel for query, key and value, stored [out, in].
class Conv1D(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.3), (self.features, x.shape[-1]))
        return x @ kernel.T + self.param("bias", nn.initializers.zeros, (self.features,))


class FusedAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(Conv1D(36, name="qkv")(nn.LayerNorm()(x)), 3, axis=-1)
        x = x + Conv1D(12, name="proj")(nn.dot_product_attention(q[..., None, :], k[..., None, :], v[..., None, :])[..., 0, :])
        return x + Conv1D(12, name="down")(nn.gelu(Conv1D(48, name="up")(x)))


# As BiT: convolutions whose kernels are standardised when they are read.
class StdConv(nn.Conv):
    def param(self, name, *args, **kwargs):
        leaf = super().param(name, *args, **kwargs)
        return (leaf - leaf.mean((0, 1, 2))) / (leaf.std((0, 1, 2)) + 1e-5) if name == "kernel" else leaf


class Standardised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = StdConv(8, (3, 3), strides=2, use_bias=False)(x)
        y = StdConv(8, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(4)(x)))
        return nn.Dense(6, name="head")((x + y).mean((1, 2)))


# As ViT in big_vision: blocks in one scan, each computed again for its gradient; a learned query pools.
class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=3)(nn.LayerNorm()(x))
        return x + nn.Dense(12)(nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))), None


class ScannedViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (4, 4), strides=4, padding="VALID", name="patches")(x).reshape(x.shape[0], -1, 12)
        x = x + self.param("positions", nn.initializers.normal(), (1, 4, 12))
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = blocks(name="blocks")(x, None)
        query = self.param("query", nn.initializers.normal(), (1, 1, 12))
        return nn.MultiHeadDotProductAttention(num_heads=3, name="pool")(jnp.tile(query, (x.shape[0], 1, 1)), x)


class BiLSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(8)), nn.RNN(nn.OptimizedLSTMCell(8)))(x)
        return nn.Dense(5, name="head")(x)


class TiedEmbeddings(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(16, 12, name="table")
        return table.attend(nn.tanh(nn.Dense(12, name="layer")(table(tokens))))


class OtherFlaxLayers(nn.Module):
    """Layers of flax that multiply with a kernel, and are none of those that run on factors."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(8, (3, 3), strides=(2, 2), name="transposed")(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.relu(nn.ConvLocal(6, (3, 3), strides=4, name="local")(x))
        return nn.Einsum((6, 2, 4), "bhwc,cgd->bhwgd", name="einsum")(x)


class GraphNet(nn.Module):
    """As in jraph: one layer for all edges, one for all nodes, twice."""

    @nn.compact
    def __call__(self, nodes, edges, senders, receivers):
        edge_layer, node_layer = nn.Dense(8, name="edge"), nn.Dense(12, name="node")
        for _ in range(2):
            edges = nn.relu(edge_layer(jnp.concatenate([edges, nodes[senders], nodes[receivers]], axis=-1)))
            received = jax.ops.segment_sum(edges, receivers, len(nodes))
            nodes = nodes + node_layer(jnp.concatenate([nodes, received], axis=-1))
        return nodes


class Experts(nn.Module):
    """As in mixtures of experts: stacked kernels in one product, or a layer under vmap."""

    @nn.compact
    def __call__(self, x):
        weights = nn.softmax(nn.Dense(3, name="router")(x))
        up = self.param("up", nn.initializers.normal(0.3), (3, 12, 16))
        y = nn.gelu(jnp.einsum("bsd,edh->ebsh", x, up))
        down = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(12, name="down")
        return jnp.einsum("ebsd,bse->bsd", down(y), weights)


class Axial(nn.Module):
    """Attention along the rows of an image, then along its columns, with relative positions."""

    @nn.compact
    def __call__(self, x):
        for axis in (1, 2):
            y = jnp.moveaxis(nn.Conv(12, (1, 1), name=f"in{axis}")(x), axis, 2)
            positions = self.param(f"positions{axis}", nn.initializers.normal(0.3), (y.shape[2], y.shape[2], 4))
            q, k, v = jnp.split(nn.DenseGeneral((3, 12), use_bias=False, name=f"qkv{axis}")(y), 3, axis=-1)
            weights = jnp.einsum("bihd,bjhd->bhij", *(a.reshape(-1, a.shape[2], 3, 4) for a in (q, k)))
            weights += jnp.einsum("bihd,ijd->bhij", q.reshape(-1, q.shape[2], 3, 4), positions)
            y = jnp.einsum("bhij,bjhd->bihd", nn.softmax(weights), v.reshape(-1, v.shape[2], 3, 4))
            x = jnp.moveaxis(y.reshape((*q.shape[:2], q.shape[2], 12)), 2, axis)
        return x


class OverDevices(nn.Module):
    """Trains with the statistics of all devices."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, axis_name="devices")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Adapted(nn.Module):
    """As LoRA, twice: an adapter beside the layer, and one that is added to its kernel."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(12, name="beside")(x)
        y += x @ self.param("a", nn.initializers.normal(0.3), (12, 2)) @ self.param("b", nn.initializers.normal(0.3), (2, 12))
        added = jnp.outer(self.param("c", nn.initializers.normal(0.3), (12,)), jnp.ones(12))

        def adapt(tree):
            return jax.tree.map(lambda leaf: leaf + added if leaf.ndim == 2 else leaf, tree)

        return nn.map_variables(nn.Dense, "params", adapt, init=True)(12, name="inside")(nn.tanh(y))


class Normalised(nn.Module):
    """Wrappers that renew what they keep of a kernel, and one around a convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Conv(12, (3,)))(x)
        return nn.Dense(5, name="head")(nn.SpectralNorm(nn.Dense(12))(nn.tanh(x), update_stats=True))


class TiedAutoencoder(nn.Module):
    """The decoder's kernel is the encoder's, transposed."""

    def __call__(self, x):
        return self.code(nn.tanh(self.code(x, 6, turned=False)), 12, turned=True)

    @nn.compact
    def code(self, x, features, turned):
        def turn(tree):
            return jax.tree.map(jnp.transpose, tree) if turned else tree

        def run(module):
            return nn.Dense(features, use_bias=False)(x)

        return nn.map_variables(run, "params", turn, turn, mutable=self.is_initializing())(self)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and how many of its parameters are run on factors, multiplied out before the model, or left dense.

    Attributes:
      counts: by the rule ".*".
      by_rows: the same, where what would stay dense is factored by its rows.
      register: arguments of `register_layer`.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    counts: dict[str, int]
    by_rows: dict[str, int]
    register: tuple[dict[str, Any], ...] = ()


GRAPH = (SEQUENCE[0], SEQUENCE[1, :5, :8], np.array([0, 1, 2, 3, 4]), np.array([1, 2, 3, 4, 0]))
GENERAL = {"cls": GeneralDense, "rows": lambda layer: range(len(layer.axis))}
CASES = {
    "T5, unregistered": Case(NamedAxes(), (TOKENS,), {"dense": 8}, {"premerged": 8}),
    "T5": Case(NamedAxes(), (TOKENS,), {"factored": 6, "dense": 2}, {"factored": 6, "premerged": 2}, (GENERAL,)),
    "GPT-2": Case(FusedAttention(), (SEQUENCE,), {"factored": 4}, {"factored": 4}, ({"cls": Conv1D, "rows": 1},)),
    "BiT": Case(Standardised(), (IMAGE,), {"factored": 1, "dense": 2}, {"factored": 1, "premerged": 2}),
    "ViT": Case(ScannedViT(), (IMAGE,), {"factored": 11, "dense": 2}, {"factored": 11, "premerged": 1, "dense": 1}),
    "BiLSTM": Case(BiLSTM(), (SEQUENCE,), {"factored": 1, "dense": 16}, {"factored": 1, "premerged": 16}),
    "BiLSTM, registered": Case(
        BiLSTM(),
        (SEQUENCE,),
        {"factored": 17},
        {"factored": 17},
        (OPTIMIZED_LSTM_CELL,),
    ),
    "tied embeddings": Case(TiedEmbeddings(), (TOKENS,), {"factored": 1, "dense": 1}, {"factored": 1, "premerged": 1}),
    "other layers": Case(OtherFlaxLayers(), (IMAGE,), {"factored": 1, "dense": 3}, {"factored": 1, "premerged": 3}),
    "graph": Case(GraphNet(), GRAPH, {"factored": 2}, {"factored": 2}),
    "experts": Case(Experts(), (SEQUENCE,), {"factored": 2, "dense": 1}, {"factored": 2, "premerged": 1}),
    "axial": Case(Axial(), (IMAGE,), {"factored": 4, "dense": 2}, {"factored": 4, "premerged": 2}),
    "devices": Case(OverDevices(), (IMAGE,), {"factored": 2}, {"factored": 2}),
    "LoRA": Case(
        Adapted(), (SEQUENCE,), {"factored": 1, "premerged": 1, "dense": 2}, {"factored": 1, "premerged": 1, "dense": 2}
    ),
    "norms": Case(Normalised(), (SEQUENCE,), {"factored": 1, "premerged": 2}, {"factored": 1, "premerged": 2}),
    "tied autoencoder": Case(TiedAutoencoder(), (SEQUENCE,), {"premerged": 1}, {"premerged": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_factored_as_expected_and_compute_what_their_products_do(name, register):
    case = CASES[name]
    for registration in case.register:
        register(**registration)
    plan = lr.plan(case.model, case.inputs, [lr.Rule(".*", rank=2)])
    assert counts(plan) == case.counts, plan
    on_factors = [lr.Rule(re.escape(kernel.name), rank=2) for kernel in plan.factored]
    rest = [lr.Rule(".*", rank=2, rows="all_but_last")] * (len(plan.factored) < len(plan.kernels))
    plan = lr.plan(case.model, case.inputs, [*on_factors, *rest])
    assert counts(plan) == case.by_rows, plan
    check_same_function(case, plan)


def counts(plan: lr.Plan) -> dict[str, int]:
    factored = [kernel.execution or "factored" for kernel in plan.factored]
    return dict(collections.Counter(factored + ["dense"] * (len(plan.kernels) - len(factored))))


def check_same_function(case: Case, plan: lr.Plan) -> None:
    """Values, renewed collections and gradients: `lr.apply` on random factors against the plain model on their products."""
    variables = jax.eval_shape(lambda: case.model.init(jax.random.key(0), *case.inputs))
    shapes = jax.eval_shape(lambda params: lr.factorize(params, plan, key=jax.random.key(0)), variables["params"])
    params = drawn(shapes)
    others = {name: jax.tree.map(jnp.abs, drawn(tree)) for name, tree in variables.items() if name != "params"}

    def with_slopes(apply: Callable[..., Any], prepare: Callable[[Any], Any]) -> Any:
        def loss(params: Any) -> Any:
            def on_device(*inputs: Any) -> Any:
                return apply(case.model, {**others, "params": prepare(params)}, *inputs, mutable=list(others))

            y, renewed = jax.vmap(on_device, axis_name="devices")(*jax.tree.map(lambda x: x[None], case.inputs))
            return jnp.sin(3 * y).sum(), (y, renewed)

        return jax.value_and_grad(loss, has_aux=True)(params)

    ours, theirs = jax.jit(
        lambda params: (with_slopes(lr.apply, lambda tree: tree), with_slopes(nn.Module.apply, lr.merge))
    )(params)  # fmt: skip
    for (leaf, a), b in zip(named_leaves(ours).items(), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-5 * max(1, np.abs(b).max()), err_msg=leaf)


def drawn(shapes: Any) -> Any:
    """Random arrays of these shapes; nothing has to be compiled for them."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
