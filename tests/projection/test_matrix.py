"""The projection against golden values, sampling, float64 and its own optimality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import projection
from lowrank_jax.projection import activations, matrix
from lowrank_jax.projection.stack import Stack
from lowrank_jax.projection.subspaces import SUBSPACES
from tests.projection import reference
from tests.projection.reference import golden_matrix, normal, relative_risk

slow = pytest.mark.slow

KINDS = ("gaussian", "deficient", "zero columns", "repeated singular values")
DRAWS = 5  # matrices of a kind


@functools.cache
def matrices(n, m):
    """`[kind * draw, n, m]`: wide, tall, one row or one column, of all kinds; one program computes them all."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((len(KINDS), DRAWS, n, m))
    drawn[1] = rng.standard_normal((DRAWS, n, 1)) @ rng.standard_normal((DRAWS, 1, m))
    drawn[2, ..., ::2] = 0
    drawn[3] = np.linalg.qr(rng.standard_normal((DRAWS, max(n, m), max(n, m))))[0][:, :n, :m]
    return drawn.reshape(-1, n, m).astype(np.float32)


def ways(rank, activation):
    """Ways to make factors, by name; those for a normalisation are told by ReLU."""
    project = functools.partial(projection.kernel_projection, rank=rank, activation=activation)
    found = {"spectral": functools.partial(projection.spectral, rank=rank)}
    found |= {subspace: functools.partial(project, subspace=subspace) for subspace in SUBSPACES}
    if activation == "relu":
        found |= {f"normalized {name}": functools.partial(project, subspace=name, normalized=True) for name in SUBSPACES}
    return found


@functools.cache
def made(n, m, rank, activation, dtype=np.float32):
    """By way: factors of all matrices, and their risks; of one more matrix, the last, an element is NaN."""
    chosen = {name: way for name, way in ways(rank, activation).items() if dtype == np.float32 or name in SUBSPACES}

    def one(w):
        pairs = {name: way(w) for name, way in chosen.items()}
        return {name: (u, v, projection.risk(w, u @ v, activation=activation)) for name, (u, v) in pairs.items()}

    broken = normal(1, 1, n, m)
    broken[0, -1, 0] = np.nan
    with jax.enable_x64(dtype == np.float64):
        found = jax.jit(jax.vmap(one))(np.concatenate([matrices(n, m), broken]).astype(dtype))
    return jax.tree.map(np.asarray, found)


RELU = [
    pytest.param((5, 9, 3), "relu"),
    pytest.param((9, 5, 5), "relu"),
    *(
        pytest.param(case, "relu", marks=slow)
        for case in [(1, 7, 1), (7, 1, 1), (5, 9, 1), (5, 9, 5), (9, 5, 1), (9, 5, 3), (8, 8, 4), (8, 8, 8)]
    ),
]
TANH = [pytest.param((9, 5, 3), "tanh"), *(pytest.param(case, "tanh", marks=slow) for case in [(5, 9, 3), (1, 7, 1)])]


@pytest.mark.parametrize(("case", "activation"), RELU + TANH)
def test_every_subspace_is_worth_its_trouble(case, activation):
    n, m, _ = case
    found = made(*case, activation)
    risks = np.stack([found[name][2][:-1] for name in ("spectral", *SUBSPACES)])
    whole = np.array([reference.risk(w, 0 * w, activation) for w in matrices(n, m)])
    assert (np.diff(risks, axis=0) <= 2e-5 * whole).all()


@pytest.mark.parametrize(("case", "activation"), RELU)
def test_risks_of_relu_are_the_closed_form(case, activation):
    n, m, _ = case
    for u, v, risks in made(*case, activation).values():
        for w, u_i, v_i, risk in zip(matrices(n, m), u[:-1], v[:-1], risks[:-1], strict=True):
            np.testing.assert_allclose(risk, reference.risk(w, u_i @ v_i), atol=2e-5 * reference.risk(w, 0 * w))


@pytest.mark.parametrize(("case", "activation"), RELU)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_normalized_keeps_every_length_and_serves_directions(case, activation, subspace):
    n, m, _ = case
    u, v, _ = made(*case, activation)[f"normalized {subspace}"]
    top_u, top_v, _ = made(*case, activation)["normalized top"]
    for w, y, top in zip(matrices(n, m), u @ v, top_u @ top_v, strict=False):
        lengths = np.linalg.norm(w, axis=0)
        np.testing.assert_allclose(np.linalg.norm(y, axis=0), lengths, atol=2e-5 * lengths.max())
        directions, ours, theirs = (reference.ratio(part, lengths) for part in (w, y, top))
        assert reference.risk(directions, ours) <= reference.risk(directions, theirs) + 2e-5 * m


@pytest.mark.parametrize(("case", "activation"), RELU)
def test_no_other_length_of_a_column_does_better(case, activation):
    n, m, _ = case
    u, v, _ = made(*case, activation)["top"]
    for w, y in zip(matrices(n, m), u @ v, strict=False):
        least = reference.risk(w, y) - 1e-5 * reference.risk(w, 0 * w)
        assert all(least <= reference.risk(w, factor * y) for factor in np.linspace(0.5, 1.5, 21))


@pytest.mark.parametrize(("case", "activation"), RELU + TANH)
def test_factors_are_balanced(case, activation):
    for u, v, _ in made(*case, activation).values():
        u, v = u[:-1], v[:-1]
        size = 1 + np.abs(v).max(axis=(1, 2), keepdims=True) ** 2
        np.testing.assert_allclose(u.swapaxes(1, 2) @ u / size, v @ v.swapaxes(1, 2) / size, atol=2e-5)


@pytest.mark.parametrize(("case", "activation"), RELU)
def test_full_rank_changes_nothing_and_zero_columns_stay_zero(case, activation):
    n, m, rank = case
    for name in ("spectral", *SUBSPACES):
        u, v, _ = made(*case, activation)[name]
        for w, y in zip(matrices(n, m), u @ v, strict=False):
            np.testing.assert_allclose(y[:, ~w.any(axis=0)], 0, atol=1e-6)
            if rank == min(n, m):
                np.testing.assert_allclose(y, w, atol=2e-5)


@pytest.mark.parametrize(("case", "activation"), RELU + TANH)
def test_under_a_transformation_nan_stays_nan(case, activation):
    for u, v, risk in made(*case, activation).values():
        assert np.isnan(u[-1] @ v[-1]).any()
        assert np.isnan(risk[-1])


@pytest.mark.parametrize(("case", "activation"), [RELU[0], *TANH[1:], pytest.param((8, 8, 4), "silu", marks=slow)])
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_float32_agrees_with_float64(subspace, case, activation):
    n, m, _ = case
    narrow, wide = (made(*case, activation, dtype)[subspace][2] for dtype in (np.float32, np.float64))
    whole = np.array([reference.risk(w, 0 * w, activation) for w in matrices(n, m)])
    kept = (whole > 0) & (np.arange(len(whole)) < 3 * DRAWS)  # where singular values repeat, any basis is as good
    assert kept.sum() >= 2 * DRAWS
    np.testing.assert_allclose(narrow[:-1][kept] / whole[kept], wide[:-1][kept] / whole[kept], atol=1e-4)


@pytest.mark.parametrize(("case", "activation"), RELU)
def test_with_batchnorm_right_behind_spectral_and_the_projection_compute_the_same(case, activation):
    x = normal(2, 256, case[0])

    def outputs(name, i):
        u, v, _ = made(*case, activation)[name]
        y = x @ u[i] @ v[i]
        y -= y.mean(axis=0)
        return np.maximum(reference.ratio(y, np.where(y.std(axis=0) > 1e-6, y.std(axis=0), 0)), 0)

    for i in range(DRAWS):  # outputs at right angles to the subspace differ, and Gaussian ones never are
        for name in ("top", "normalized top"):
            np.testing.assert_allclose(outputs(name, i), outputs("spectral", i), atol=2e-4)


CASES_ALONE = [
    pytest.param((5, 9, 3), "relu"),
    *(pytest.param(*case, marks=slow) for case in [((12, 5, 3), "relu"), ((9, 5, 3), "tanh"), ((6, 9, 3), "tanh")]),
]


@pytest.mark.parametrize(("case", "activation"), CASES_ALONE)
def test_where_singular_values_repeat_all_start_from_one_basis_and_vmap_changes_nothing(case, activation):
    """Called one by one, not in one program: rounding then decides on the basis."""
    n, m, rank = case
    alone = {name: way for name, way in ways(rank, activation).items() if "normalized" not in name}
    for w in matrices(n, m)[3 * DRAWS :]:
        pairs = [way(w) for way in alone.values()]
        # By the risk that they minimise: the series for tanh is less exact than the tolerance.
        risks = [float(projection.relative_risk(w, u @ v, activation=activation)) for u, v in pairs]
        assert (np.diff(risks) <= 5e-5).all()
    for name, way in alone.items():
        (u, v), (us, vs, risks) = way(matrices(n, m)[0]), made(*case, activation)[name]
        # The descent ends at a relative gain of 1e-7, which leaves the root of that open.
        np.testing.assert_allclose(u @ v, us[0] @ vs[0], atol=4e-4 if name == "refine" and activation != "relu" else 1e-4)
        np.testing.assert_allclose(projection.risk(matrices(n, m)[0], u @ v, activation=activation), risks[0], rtol=1e-5)


GOLDEN = {  # by shape: rank, relative risks of the spectral factors and of the projection
    (12, 8): [(1, 0.696477, 0.652598), (2, 0.546249, 0.520122), (4, 0.299001, 0.283737)],
    (32, 48): [(1, 0.885527, 0.819095), (2, 0.812619, 0.761565)],
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_golden_relative_risks(shape):
    w = golden_matrix(*shape).astype(np.float32)

    @jax.jit
    def factors(w):
        return [(projection.spectral(w, rank), projection.kernel_projection(w, rank)) for rank, _, _ in GOLDEN[shape]]

    made = factors(w)
    for (_, *wanted), pairs in zip(GOLDEN[shape], made, strict=True):
        np.testing.assert_allclose([relative_risk(w, pair) for pair in pairs], wanted, atol=1e-5)
    u, v = made[-1][-1]
    np.testing.assert_allclose(projection.relative_risk(w, u @ v), GOLDEN[shape][-1][-1], atol=1e-5)


SAMPLED = [*((name, 1) for name in activations.ACTIVATIONS), ("relu", 3), ("gelu", 3)]
OUTPUTS, INPUTS = 4, 6


@functools.cache
def exact_risks():
    """By activation and group, all in one program; with the kernels that they are of."""
    kernels = {group: normal(group, 2, INPUTS, group * OUTPUTS) / np.sqrt(group) for group in (1, 3)}
    risks = {
        case: functools.partial(projection.risk, activation=case[0], group=case[1])
        for case in SAMPLED
        if case[0] != "swish"  # another name for silu
    }
    found = jax.jit(lambda kernels: {case: risk(*kernels[case[1]]) for case, risk in risks.items()})(kernels)
    return kernels, found | {("swish", 1): found["silu", 1]}


@pytest.mark.parametrize(("name", "group"), SAMPLED)
def test_risk_is_what_sampling_gives(name, group):
    kernels, found = exact_risks()
    x = np.random.default_rng(0).standard_normal((200_000, group * INPUTS), np.float32)

    def outputs_of(kernel):
        flat = kernel.reshape(INPUTS, group, OUTPUTS).swapaxes(0, 1).reshape(-1, OUTPUTS)
        return reference.FUNCTIONS[name]((x @ flat).astype(np.float64))

    w, y = kernels[group]
    losses = ((outputs_of(w) - outputs_of(y)) ** 2).sum(-1)
    error = losses.std() / np.sqrt(len(losses))
    assert abs(losses.mean() - float(found[name, group])) < 4 * error


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18])
def test_the_size_of_a_kernel_does_not_matter(size):
    w = normal(0, 5, 9)  # as above, where it is compiled
    (u, v), (a, b) = (projection.kernel_projection(part, 3) for part in (w, np.float32(size) * w))
    root = np.float32(np.sqrt(size))
    np.testing.assert_allclose((a / root) @ (b / root), u @ v, atol=1e-5)
    if size == 1e18:  # a risk is of the square of that size
        whole = projection.risk(np.float32(size) * w, 0 * w)
        np.testing.assert_allclose(float(whole) / size / size, reference.risk(w, 0 * w), rtol=1e-5)


def test_identity_activation_makes_the_projection_spectral():
    w = normal(0, 5, 9)
    u, v = projection.kernel_projection(w, 3, activation="identity")
    a, b = projection.spectral(w, 3)
    np.testing.assert_allclose(u @ v, a @ b, atol=1e-5)
    difference = projection.risk(w, u @ v, activation="identity")
    np.testing.assert_allclose(difference, np.sum((w - np.asarray(u @ v)) ** 2), rtol=1e-5)


def test_an_output_at_right_angles_to_the_subspace_keeps_the_length_that_serves_best():
    w = np.diag(np.float32([3, 2, 1]))
    u, v = (np.asarray(factor) for factor in projection.kernel_projection(w, 1))
    np.testing.assert_allclose(np.linalg.norm(u @ v, axis=0), [3, 2 / np.pi, 1 / np.pi], rtol=1e-5)
    half = 0.5 * np.array([9, 4, 1])
    np.testing.assert_allclose(projection.risk(w, u @ v), (half * [0, 1 - 1 / np.pi**2, 1 - 1 / np.pi**2]).sum(), rtol=1e-5)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("activation", ["relu", pytest.param("silu", marks=slow)])
def test_refine_finds_the_best_of_all_lines_in_the_plane(activation, normalized):
    w = np.random.default_rng(5).standard_normal((2, 7)).astype(np.float32)
    kind = {"activation": activation, "normalized": normalized}
    sizes = np.linalg.norm(w, axis=0) if normalized else np.ones(7, np.float32)

    @jax.jit
    def losses(angle):
        """Of lines at all angles from this one on, and of the subspace that is found."""

        def loss(factors):
            u, v = factors
            return projection.risk(w / sizes, (u @ v) / sizes, activation=activation)

        angles = angle + jnp.linspace(0, jnp.pi, 1001)
        lines = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)[..., None]
        every = jax.vmap(lambda q: loss(projection.on_subspace(w, q, **kind)))(lines)
        return every.min(), loss(projection.kernel_projection(w, 1, subspace="refine", **kind))

    found = [losses(np.float32(np.pi / 4000 * quarter)) for quarter in range(4)]
    np.testing.assert_allclose(found[0][1], min(least for least, _ in found), rtol=2e-5)


def test_a_group_shares_one_scale():
    w = golden_matrix(12, 3 * 5).astype(np.float32)
    u, v = projection.kernel_projection(w, 2, group=3)
    a, b = projection.spectral(w, 2)
    scale = np.asarray(u @ v) / np.asarray(a @ b)
    np.testing.assert_allclose(scale[0].reshape(3, 5), np.tile(scale[0, :5], (3, 1)), rtol=1e-4)
    assert relative_risk(w, (u, v), group=3) < relative_risk(w, (a, b), group=3)


@pytest.mark.parametrize(
    "kind", [{}, *(pytest.param(kind, marks=slow) for kind in ({"activation": "silu"}, {"subspace": "refine"}))]
)
def test_derivatives_of_what_the_projection_loses_are_those_of_differences(kind):
    with jax.enable_x64(True):

        @jax.jit
        @jax.vmap
        @jax.value_and_grad
        def lost(w):
            u, v = projection.kernel_projection(w, 2, **kind)
            return projection.risk(w, u @ v, activation=kind.get("activation", "relu"))

        step = np.zeros((8, 6))
        step[1, 2] = 1e-5
        (_, up, down), (grad, *_) = lost(golden_matrix(8, 6) + np.stack([0 * step, step, -step]))
        np.testing.assert_allclose(grad[1, 2], (up - down) / 2e-5, rtol=1e-3)


def test_derivatives_of_a_risk_are_those_of_differences_and_finite_everywhere():
    slope = jax.jit(jax.grad(lambda y, w: projection.risk(w, y)))
    w = golden_matrix(8, 6)
    with jax.enable_x64(True):
        y = w**2
        grad = slope(y, w)
    step = np.zeros_like(w)
    step[0, 0] = 1e-6
    wanted = (reference.risk(w, y + step) - reference.risk(w, y - step)) / 2e-6
    np.testing.assert_allclose(grad[0, 0], wanted, rtol=1e-6)
    w = w.astype(np.float32)
    assert np.isfinite(slope(w, w)).all()
    assert np.isfinite(slope(0 * w, w)).all()
    assert np.isfinite(slope(0 * w, 0 * w)).all()


def with_element(value):
    w = np.ones((4, 6), np.float32)
    w[1, 2] = value
    return w


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: projection.spectral(w, 0), "rank 0 of a 4x6 matrix: must be a whole number from 1 to 4"),
        (lambda w: projection.kernel_projection(w, 5), "rank 5 of a 4x6 matrix"),
        (lambda w: projection.spectral(w[0], 1), r"expected a matrix \[n, m\], got shape \[6\]"),
        (lambda w: projection.spectral(w.astype(np.int32), 1), "real numbers"),
        (lambda w: projection.kernel_projection(w, 1, subspace="tpo"), "unknown subspace 'tpo'; did you mean top"),
        (lambda w: projection.kernel_projection(w, 1, activation="x"), "unknown activation 'x'"),
        (lambda w: projection.kernel_projection(w, 1, group=4), "group 4 does not divide the 6 columns"),
        (lambda w: projection.risk(w, w.T), "must have the same shape"),
        (lambda w: projection.spectral(w, 1.5), "rank 1.5 of a 4x6 matrix"),
        (lambda w: projection.spectral([[1.0]], 1), "expected a matrix"),
        (lambda w: projection.spectral(with_element(np.nan), 1), "the 4x6 matrix contains non-finite values"),
        (lambda w: projection.kernel_projection(with_element(np.inf), 1), "contains non-finite values"),
        (lambda w: projection.risk(w, with_element(np.nan)), "contains non-finite values"),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((4, 6), np.float32))


@pytest.mark.slow
def test_refine_of_silu_is_the_same_under_vmap():
    w = np.stack([golden_matrix(8, 6), golden_matrix(8, 6) ** 2]).astype(np.float32)
    kind = {"subspace": "refine", "activation": "silu"}
    u, v = jax.jit(jax.vmap(lambda w: projection.kernel_projection(w, 2, **kind)))(w)
    a, b = projection.kernel_projection(w[1], 2, **kind)
    np.testing.assert_allclose(u[1] @ v[1], a @ b, atol=1e-4)


def rotation(seed, n):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def large_column(seed, n):
    w = np.random.default_rng(seed).standard_normal((n, n))
    w[:, 3] *= 1e4
    return w


ILL_CONDITIONED = {  # kernel and rank: like trained ones, with singular values of which a Gram matrix holds no digits
    "hilbert": (1 / (np.arange(60)[:, None] + np.arange(60) + 1), 8),
    "squares": (rotation(0, 64) * np.arange(1, 65.0) ** -2 @ rotation(1, 64), 40),
    "a large column": (large_column(2, 64), 30),
    "an offset": (np.random.default_rng(3).standard_normal((64, 64)) + 1e3, 30),
    "tall": (rotation(4, 90)[:, :40] * np.geomspace(1, 1e-6, 40) @ rotation(5, 40), 20),
    "wide": (rotation(5, 40) * np.geomspace(1, 1e-6, 40) @ rotation(4, 90)[:40], 20),
}


def error(w, factors):
    u, v = (np.asarray(factor, np.float64) for factor in factors)
    return np.linalg.norm(w.astype(np.float64) - u @ v) / np.linalg.norm(w.astype(np.float64))


def lapack_error(w, rank):
    """Of the truncated decomposition in float32, with the root of the singular values on both sides."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    assert s.dtype == np.float32
    return error(w, (u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vt[:rank]))


@functools.cache
def ill_conditioned_together():
    """Spectral factors of all of them, padded to few shapes, by name."""

    @jax.jit
    def factors(ws):
        return matrix.spectral_stacks([Stack(None, ws[name][None], rank) for name, (_, rank) in ILL_CONDITIONED.items()])

    made = factors({name: w.astype(np.float32) for name, (w, _) in ILL_CONDITIONED.items()})
    return {name: (u[0], v[0]) for name, (u, v) in zip(ILL_CONDITIONED, made, strict=True)}


@pytest.mark.parametrize("name", ILL_CONDITIONED)
def test_small_singular_values_cost_no_more_digits_than_in_lapack(name):
    w, rank = ILL_CONDITIONED[name]
    w = w.astype(np.float32)
    wanted = lapack_error(w, rank)
    alone = projection.spectral(w, rank)
    for factors in (alone, ill_conditioned_together()[name]):
        assert error(w, factors) < 1.3 * wanted
    u, v = (np.asarray(factor) for factor in alone)
    np.testing.assert_allclose(u.T @ u, v @ v.T, atol=1e-5 * np.linalg.norm(w))


@pytest.mark.parametrize("name", ["hilbert", "tall"])
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_small_singular_values_are_kept_by_every_subspace(subspace, name):
    if subspace != "top" and name == "tall":
        return  # compiles for seconds, and tells no more
    w, rank = ILL_CONDITIONED[name]
    u, v = projection.kernel_projection(w.astype(np.float32), rank, subspace=subspace, activation="identity")
    assert error(w.astype(np.float32), (u, v)) < 1.5 * lapack_error(w.astype(np.float32), rank)


def test_matrices_that_need_another_pass_do_not_change_the_others():
    good = normal(0, 2, 64, 64)
    bad = np.stack([ILL_CONDITIONED["squares"][0], ILL_CONDITIONED["a large column"][0]]).astype(np.float32)

    @jax.jit
    def factors(w):
        return matrix.spectral_stacks([Stack(None, w, 30)])[0]

    (u, v), (a, b) = factors(np.concatenate([good[:1], bad[:1]])), factors(good)
    np.testing.assert_array_equal(u[0] @ v[0], a[0] @ b[0])
    (u, v) = factors(bad)
    for i in range(2):
        assert error(bad[i], (u[i], v[i])) < 1.01 * lapack_error(bad[i], 30)


def test_derivatives_where_another_pass_is_needed_are_those_of_differences():
    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def kept(w):
            u, v = projection.kernel_projection(w, 3)
            return jnp.sum((u @ v)[2:, 1:] ** 2)

        w = rotation(0, 8)[:, :6] * np.array([1, 1e-2, 1e-5, 1e-7, 1e-7, 3e-8]) @ rotation(1, 6)  # eps^¼ is 1e-4
        step = np.zeros((8, 6))
        step[1, 2] = 1e-9
        (_, grad), (up, _), (down, _) = kept(w), kept(w + step), kept(w - step)
        np.testing.assert_allclose(grad[1, 2], (up - down) / 2e-9, rtol=1e-4)
