import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.models.vit import sincos
from tests import drawn

SMALL = {"width": 16, "depth": 2, "heads": 2, "patch": 8}


def small(**kwargs):
    return models.build("vit_s16", num_classes=7, **{**SMALL, **kwargs})


def fed(model, size=16):
    x = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    return x, drawn.variables(model, x)


def test_every_kernel_has_a_path_of_its_own_and_a_matrix_that_makes_sense():
    """Queries, keys and values read the features, [384, 6 * 64]; the output reads all heads together, [6 * 64, 384]."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    rules = [
        lr.Rule("head/kernel"),
        lr.Rule("embed/kernel", scale=0.25, activation="identity"),
        lr.Rule(".*/attention/.*/kernel", scale=0.25, activation="identity"),
        lr.Rule(".*/mlp/fc1/kernel", scale=0.25, activation="gelu"),
        lr.Rule(".*/mlp/fc2/kernel", scale=0.25, activation="identity"),
    ]
    plan = lr.plan(models.build("vit_s16", num_classes=1000), image, rules)
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    query, out = kernels["block1/attention/query/kernel"], kernels["block1/attention/out/kernel"]
    assert (query.shape, query.view.n, query.view.m, query.rank) == ((384, 6, 64), 384, 384, 96)
    assert (out.shape, out.view.n, out.view.m, out.rank) == ((6, 64, 384), 384, 384, 96)
    assert query.macs == 197 * 384 * 384
    assert kernels["block12/mlp/fc1/kernel"].rule.activation == "gelu"
    assert kernels["block12/mlp/fc2/kernel"].rule.activation == "identity"
    assert len(plan.factored) == 1 + 12 * 6
    assert kernels.keys() - {kernel.name for kernel in plan.factored} == {"head/kernel", "positions", "token"}


def test_attention_is_softmax_attention():
    """The attention of the first block, written out."""
    model = small(depth=1)
    x, variables = fed(model)
    run = jax.jit(functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"]))
    seen, p = run(variables, x)[1]["intermediates"]["block1"], variables["params"]["block1"]["attention"]
    tokens = np.asarray(seen["norm1"]["__call__"][0])
    q, k, v = (
        np.einsum("btd,dhe->bhte", tokens, p[name]["kernel"]) + p[name]["bias"][:, None] for name in ("query", "key", "value")
    )
    weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhte,hed->btd", weights @ v, p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(seen["attention"]["__call__"][0], expected, atol=1e-5)


def test_the_token_and_its_position_are_parameters_only_where_they_are_used():
    _, variables = fed(small())
    assert variables["params"]["positions"].shape == (1, 5, 16)
    assert variables["params"]["token"].shape == (1, 1, 16)
    _, variables = fed(small(pool="mean"))
    assert variables["params"]["positions"].shape == (1, 4, 16)
    assert "token" not in variables["params"]
    _, variables = fed(small(positions="sincos"))
    assert "positions" not in variables["params"]


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_tell_patches_apart(positions):
    """Without them the mean over the patches would not see their order."""
    model = small(pool="mean", positions=positions)
    x, variables = fed(model)
    upside_down = np.concatenate([x[:, 8:], x[:, :8]], axis=1)
    run = jax.jit(model.apply)
    assert not np.allclose(run(variables, x), run(variables, upside_down), atol=1e-4)
    if positions == "learned":
        variables["params"]["positions"] *= 0
        np.testing.assert_allclose(run(variables, x), run(variables, upside_down), atol=1e-5)


def test_sincos_positions_are_made_of_row_and_column():
    positions = np.asarray(jax.jit(sincos, static_argnums=(0, 1, 2))(3, 4, 16)).reshape(3, 4, 16)
    np.testing.assert_array_equal(positions[0, :, :8], positions[2, :, :8])  # the column alone
    np.testing.assert_array_equal(positions[:, 0, 8:], positions[:, 3, 8:])  # the row alone
    np.testing.assert_allclose(positions[1, 2, [0, 4]], [np.sin(2), np.cos(2)], rtol=1e-6)
    np.testing.assert_allclose(positions[1, 2, [8, 12]], [np.sin(1), np.cos(1)], rtol=1e-6)
    assert len(np.unique(positions.reshape(12, 16), axis=0)) == 12


def test_stochastic_depth_spares_the_first_block():
    model = small(depth=1, stochastic_depth=0.9)
    x, variables = fed(model)
    train = functools.partial(model.apply, train=True, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_allclose(jax.jit(train)(variables, x), jax.jit(model.apply)(variables, x), atol=1e-6)
