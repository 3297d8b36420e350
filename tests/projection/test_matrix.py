"""The projection against golden values, sampling, float64 and its own optimality."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.projection import activations, methods
from lowrank_jax.projection import matrix as projection
from lowrank_jax.projection.subspaces import SUBSPACES


def golden_matrix(n, m):
    i, j = np.meshgrid(np.arange(n), np.arange(m), indexing="ij")
    return np.sin(1 + i * j + 0.37 * i + 0.91 * j) * (1 + j / m)


KINDS = ("gaussian", "deficient", "zero columns")


@st.composite
def matrices(draw, kinds=(*KINDS, "repeated singular values")):
    """Matrices and ranks: wide, tall, one row, one column, and the kinds above; few shapes, as each one is compiled."""
    n, m = draw(st.sampled_from([(1, 7), (7, 1), (5, 9), (9, 5), (8, 8)]))
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    w = rng.standard_normal((n, m))
    if kind == "deficient":
        w = rng.standard_normal((n, 1)) @ rng.standard_normal((1, m))
    elif kind == "zero columns":
        w[:, ::2] = 0
    elif kind == "repeated singular values":
        w = np.linalg.qr(rng.standard_normal((max(n, m), max(n, m))))[0][:n, :m]
    return jnp.asarray(w, jnp.float32), draw(st.sampled_from(sorted({1, (1 + min(n, m)) // 2, min(n, m)})))


def relative_risk(w, factors, **settings):
    u, v = factors
    return float(projection.risk(w, u @ v, **settings) / projection.risk(w, 0 * w, **settings))


@pytest.mark.parametrize(
    ("n", "m", "rank", "spectral", "top"),
    [
        (12, 8, 1, 0.696477, 0.652598),
        (12, 8, 2, 0.546249, 0.520122),
        (12, 8, 4, 0.299001, 0.283737),
        (32, 48, 1, 0.885527, 0.819095),
        (32, 48, 2, 0.812619, 0.761565),
    ],
)
def test_golden_relative_risks(n, m, rank, spectral, top):
    w = jnp.asarray(golden_matrix(n, m), jnp.float32)
    np.testing.assert_allclose(relative_risk(w, projection.spectral(w, rank)), spectral, atol=1e-5)
    np.testing.assert_allclose(relative_risk(w, projection.kernel_projection(w, rank)), top, atol=1e-5)


@pytest.mark.parametrize(("name", "group"), [*((name, 1) for name in activations.ACTIVATIONS), ("relu", 3), ("gelu", 3)])
def test_risk_is_what_sampling_gives(name, group):
    rng = np.random.default_rng(0)
    n, outputs = 6, 4
    w, y = rng.standard_normal((2, n, group * outputs)).astype(np.float32) / np.sqrt(group)
    x = rng.standard_normal((200_000, group, n), np.float32)
    fn = jax.jit(activations.get(name).fn)

    def outputs_of(kernel):
        return np.asarray(fn(np.einsum("bgn,ngo->bo", x, kernel.reshape(n, group, outputs))), np.float64)

    losses = ((outputs_of(w) - outputs_of(y)) ** 2).sum(-1)
    error = losses.std() / np.sqrt(len(losses))
    exact = float(projection.risk(jnp.asarray(w), jnp.asarray(y), activation=name, group=group))
    assert abs(losses.mean() - exact) < 4 * error


@settings(max_examples=12)  # nearly each is a shape of its own to compile, four times
@given(matrices(), st.sampled_from(["relu", "tanh"]))
def test_every_subspace_is_worth_its_trouble(case, activation):
    w, rank = case
    kinds = [projection.spectral(w, rank)]
    kinds += [projection.kernel_projection(w, rank, subspace=subspace, activation=activation) for subspace in SUBSPACES]
    spectral, top, search, refine = (projection.risk(w, u @ v, activation=activation) for u, v in kinds)
    slack = 2e-5 * projection.risk(w, 0 * w, activation=activation)
    assert top <= spectral + slack
    assert search <= top + slack
    assert refine <= search + slack


@given(matrices(), st.sampled_from(SUBSPACES))
def test_normalized_keeps_every_length_and_serves_directions(case, subspace):
    w, rank = case
    u, v = projection.kernel_projection(w, rank, subspace=subspace, normalized=True)
    lengths = jnp.linalg.norm(w, axis=0)
    np.testing.assert_allclose(jnp.linalg.norm(u @ v, axis=0), lengths, atol=2e-5 * float(lengths.max()))
    directions = w / jnp.where(lengths > 0, lengths, 1)
    top, ours = (
        projection.risk(directions, (a @ b) / jnp.where(lengths > 0, lengths, 1))
        for a, b in (projection.kernel_projection(w, rank, normalized=True), (u, v))
    )
    assert ours <= top + 2e-5 * w.shape[1]


@given(matrices(), st.floats(0.5, 1.5))
def test_no_other_length_of_a_column_does_better(case, factor):
    w, rank = case
    u, v = projection.kernel_projection(w, rank)
    y = u @ v
    assert projection.risk(w, y) <= projection.risk(w, factor * y) + 1e-5 * projection.risk(w, 0 * w)


@given(matrices())
def test_factors_are_balanced(case):
    w, rank = case
    made = [projection.kernel_projection(w, rank, subspace=subspace) for subspace in SUBSPACES]
    for u, v in (projection.spectral(w, rank), *made):
        np.testing.assert_allclose(u.T @ u, v @ v.T, atol=2e-5 * (1 + float(jnp.abs(v).max()) ** 2))


@given(matrices())
def test_full_rank_changes_nothing(case):
    w, _ = case
    for factors in (projection.spectral(w, min(w.shape)), projection.kernel_projection(w, min(w.shape))):
        np.testing.assert_allclose(factors[0] @ factors[1], w, atol=2e-5)


@pytest.mark.parametrize("subspace", SUBSPACES)
@settings(max_examples=8)
@given(case=matrices(KINDS), activation=st.sampled_from(["relu", "silu"]))
def test_float32_agrees_with_float64(subspace, case, activation):  # where singular values repeat, any basis is as good
    w, rank = case
    if not np.any(w):
        return

    def risk(w):
        factors = projection.kernel_projection(w, rank, subspace=subspace, activation=activation)
        return relative_risk(w, factors, activation=activation)

    narrow = risk(w)
    with jax.enable_x64(True):
        wide = risk(jnp.asarray(np.asarray(w, np.float64)))
    np.testing.assert_allclose(narrow, wide, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18])
def test_the_size_of_a_kernel_does_not_matter(size):
    w = jnp.asarray(golden_matrix(9, 12), jnp.float32)
    (u, v), (a, b) = projection.kernel_projection(w, 2), projection.kernel_projection(size * w, 2)
    np.testing.assert_allclose((a / np.sqrt(size)) @ (b / np.sqrt(size)), u @ v, atol=1e-5)
    if size == 1e18:  # a risk is of the square of that size
        np.testing.assert_allclose(projection.risk(size * w, 0 * w) / size / size, projection.risk(w, 0 * w), rtol=1e-5)


def test_zero_columns_stay_zero():
    w = jnp.asarray(golden_matrix(8, 6), jnp.float32).at[:, 2].set(0)
    u, v = projection.kernel_projection(w, 2)
    np.testing.assert_allclose((u @ v)[:, 2], 0, atol=1e-6)


def test_identity_activation_makes_the_projection_spectral():
    w = jnp.asarray(golden_matrix(10, 14), jnp.float32)
    u, v = projection.kernel_projection(w, 3, activation="identity")
    a, b = projection.spectral(w, 3)
    np.testing.assert_allclose(u @ v, a @ b, atol=1e-5)
    difference = projection.risk(w, u @ v, activation="identity")
    np.testing.assert_allclose(difference, jnp.sum((w - u @ v) ** 2), rtol=1e-5)


def test_an_output_at_right_angles_to_the_subspace_keeps_the_length_that_serves_best():
    w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    u, v = projection.kernel_projection(w, 1)
    np.testing.assert_allclose(jnp.linalg.norm(u @ v, axis=0), [3, 2 / np.pi, 1 / np.pi], rtol=1e-5)
    half = 0.5 * np.array([9, 4, 1])
    np.testing.assert_allclose(projection.risk(w, u @ v), (half * [0, 1 - 1 / np.pi**2, 1 - 1 / np.pi**2]).sum(), rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("normalized", [False, True])
def test_refine_finds_the_best_of_all_lines_in_the_plane(activation, normalized):
    w = jnp.asarray(np.random.default_rng(5).standard_normal((2, 7)), jnp.float32)
    kind = {"activation": activation, "normalized": normalized}

    def loss(factors):
        u, v = factors
        lengths = jnp.linalg.norm(w, axis=0) if normalized else jnp.ones(7)
        return projection.risk(w / lengths, (u @ v) / lengths, activation=activation)

    angles = jnp.linspace(0, np.pi, 4001)
    lines = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)[..., None]
    least = jax.jit(lambda q: jax.lax.map(lambda q: loss(projection.on_subspace(w, q, **kind)), q))(lines).min()
    np.testing.assert_allclose(loss(projection.kernel_projection(w, 1, subspace="refine", **kind)), least, rtol=2e-5)


def test_a_group_shares_one_scale():
    w = jnp.asarray(golden_matrix(12, 3 * 5), jnp.float32)
    u, v = projection.kernel_projection(w, 2, group=3)
    a, b = projection.spectral(w, 2)
    scale = (u @ v) / (a @ b)
    np.testing.assert_allclose(scale[0].reshape(3, 5), np.tile(scale[0, :5], (3, 1)), rtol=1e-4)
    assert relative_risk(w, (u, v), group=3) < relative_risk(w, (a, b), group=3)


def lost_by_projection(w, kind):
    u, v = projection.kernel_projection(w, 2, **kind)
    return projection.risk(w, u @ v, activation=kind.get("activation", "relu"))


def test_it_jits_vmaps_and_differentiates():
    w = jnp.asarray(np.stack([golden_matrix(8, 6), golden_matrix(8, 6) ** 2]), jnp.float32)
    for kind in ({}, {"subspace": "search"}, {"subspace": "refine", "activation": "silu"}):
        u, v = jax.jit(jax.vmap(lambda w, kind=kind: projection.kernel_projection(w, 2, **kind)))(w)
        alone = projection.kernel_projection(w[1], 2, **kind)
        np.testing.assert_allclose(u[1] @ v[1], alone[0] @ alone[1], atol=1e-4)
    with jax.enable_x64(True):
        a, b = (jnp.asarray(np.asarray(part, np.float64)) for part in w)
        grad = jax.grad(lambda y: projection.risk(a, y))(b)
        up, down = (projection.risk(a, b.at[0, 0].add(step)) for step in (1e-6, -1e-6))
        np.testing.assert_allclose(grad[0, 0], (up - down) / 2e-6, rtol=1e-6)
        for kind in ({"activation": "silu"}, {"subspace": "refine"}):
            lost = functools.partial(lost_by_projection, kind=kind)
            grad = jax.grad(lost)(a)
            up, down = (lost(a.at[1, 2].add(step)) for step in (1e-5, -1e-5))
            np.testing.assert_allclose(grad[1, 2], (up - down) / 2e-5, rtol=1e-3)
    assert np.isfinite(jax.grad(lambda y: projection.risk(w[0], y))(w[0])).all()
    assert np.isfinite(jax.grad(lambda y: projection.risk(w[0], y))(0 * w[0])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: projection.spectral(w, 0), "rank 0 of a 4x6 matrix: must be a whole number from 1 to 4"),
        (lambda w: projection.kernel_projection(w, 5), "rank 5 of a 4x6 matrix"),
        (lambda w: projection.spectral(w[0], 1), r"expected a matrix \[n, m\], got shape \[6\]"),
        (lambda w: projection.spectral(w.astype(jnp.int32), 1), "real numbers"),
        (lambda w: projection.kernel_projection(w, 1, subspace="tpo"), "unknown subspace 'tpo'; did you mean top"),
        (lambda w: projection.kernel_projection(w, 1, activation="x"), "unknown activation 'x'"),
        (lambda w: projection.kernel_projection(w, 1, group=4), "group 4 does not divide the 6 columns"),
        (lambda w: projection.risk(w, w.T), "must have one shape"),
        (lambda w: projection.spectral(w, 1.5), "rank 1.5 of a 4x6 matrix"),
        (lambda w: projection.spectral([[1.0]], 1), "expected a matrix"),
        (lambda w: projection.spectral(w.at[1, 2].set(jnp.nan), 1), "the 4x6 matrix has elements that are not finite"),
        (lambda w: projection.kernel_projection(w.at[0, 0].set(jnp.inf), 1), "elements that are not finite"),
        (lambda w: projection.risk(w, w.at[0, 0].set(jnp.nan)), "elements that are not finite"),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 6)))


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_under_a_transformation_nan_stays_nan(subspace, activation):
    w = jnp.ones((4, 6)).at[1, 2].set(jnp.nan)
    u, v = jax.jit(lambda w: projection.kernel_projection(w, 2, subspace=subspace, activation=activation))(w)
    assert np.isnan(u @ v).any()
    assert np.isnan(jax.jit(lambda w: projection.risk(w, 0 * w, activation=activation))(w))


def test_with_batchnorm_right_behind_spectral_and_the_projection_compute_the_same():
    layer = nn.Sequential([nn.Conv(24, (3, 3), use_bias=False), nn.BatchNorm(use_running_average=False, epsilon=0.0), nn.relu])
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 5))
    variables = layer.init(jax.random.key(1), x)
    w = variables["params"]["layers_0"]["kernel"]
    outputs = {}
    for method in ("spectral", "kernel_projection", "norm_preserving"):
        u, v = methods.factor(method, jax.random.key(2), w.reshape(-1, 24), 3)
        params = {**variables["params"], "layers_0": {"kernel": (u @ v).reshape(w.shape)}}
        outputs[method], _ = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
    for method in ("kernel_projection", "norm_preserving"):
        np.testing.assert_allclose(outputs[method], outputs["spectral"], atol=2e-4)


@pytest.mark.parametrize("shape", [(6, 9), (12, 5)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_where_singular_values_repeat_all_start_from_one_basis(shape, activation):
    for seed in range(4):
        rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((max(shape), max(shape))))[0]
        w = jnp.asarray(rotation[: shape[0], : shape[1]], jnp.float32)
        made = [projection.spectral(w, 3)]
        made += [projection.kernel_projection(w, 3, activation=activation, subspace=subspace) for subspace in SUBSPACES]
        risks = [float(projection.relative_risk(w, u @ v, activation=activation)) for u, v in made]
        assert (np.diff(risks) <= 5e-5).all()
