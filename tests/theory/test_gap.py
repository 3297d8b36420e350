"""The gap against the risks it is the difference of, sampling and a table; the bound against all that it bounds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lowrank_jax.projection import matrix
from lowrank_jax.theory import gap, gaussian_gap, relative_gap, risk_bound, sampled_gap

slow = pytest.mark.slow
SHAPES = [(8, 12, 2), pytest.param((12, 8, 3), marks=slow)]


def h(rho):
    return (np.sqrt(1 - rho**2) + (np.pi - np.arccos(rho)) * rho) / np.pi


def draw(seed, n, m):
    """A matrix with columns of several sizes, one of them zero."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, m)) * np.r_[0, rng.uniform(0.2, 3, m - 1)]


@functools.cache
def measured(n, m, rank):
    """Of 40 matrices, by one program: gap and bound, what they are compared with, and how much there is to lose."""

    @jax.jit
    @jax.vmap
    def measure(w, key):
        keys = jax.random.split(key, 4)
        made = {name: matrix.kernel_projection(w, rank, subspace=name) for name in ("top", "search", "refine")}
        made["spectral"] = matrix.spectral(w, rank)
        made["random"] = jax.random.normal(keys[0], (n, rank)), jax.random.normal(keys[1], (rank, m))
        made["subspace"] = matrix.on_subspace(w, jnp.linalg.qr(w @ jax.random.normal(keys[2], (m, rank)))[0])
        u, v = made["refine"]
        made["near"] = u + 0.01 * jax.random.normal(keys[3], u.shape), v
        risks = {name: matrix.risk(w, u @ v) for name, (u, v) in made.items()}
        return relative_gap(w, rank), relative_gap(1e9 * w, rank), risk_bound(w, rank), matrix.risk(w, 0 * w), risks

    found = measure(np.stack([draw(seed, n, m) for seed in range(40)]), jax.random.split(jax.random.key(0), 40))
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gap_is_the_difference_of_the_risks(shape):
    found, scaled, _, whole, risks = measured(*shape)
    wanted = (risks["spectral"] - risks["top"]) / whole
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(scaled, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 12), pytest.param((12, 8), marks=slow)])
def test_at_full_rank_there_is_no_gap(shape):
    assert 0 <= relative_gap(draw(0, *shape), 8) < 1e-12
    assert abs(sampled_gap(jax.random.key(0), draw(0, *shape), 8, samples=1000).mean) < 1e-12


def test_a_layer_that_is_zero_has_no_gap():
    w = np.zeros((8, 12))
    estimate = sampled_gap(jax.random.key(0), w, 2, samples=20_000)
    assert (relative_gap(w, 2), estimate.mean, estimate.half) == (0, 0, 0)


@slow
def test_sampling_gives_the_gap_as_often_as_it_says():
    """Of 300 estimates and their intervals: the errors are those of a standard Gaussian, within five standard errors."""
    w = draw(1, 8, 12)
    exact = float(relative_gap(w, 2))
    estimates = [sampled_gap(key, w, 2, samples=2000) for key in jax.random.split(jax.random.key(0), 300)]
    scores = np.array([(estimate.mean - exact) / (estimate.half / 1.96) for estimate in estimates])
    assert abs(scores.mean()) < 5 / math.sqrt(300)
    assert abs(np.mean(scores**2) - 1) < 5 * math.sqrt(2 / 300)
    assert max(estimate.half for estimate in estimates) < 0.3 * exact


def test_the_sampled_interval_narrows_with_the_root_of_the_samples():
    w = draw(1, 8, 12)
    few, many = (sampled_gap(jax.random.key(0), w, 2, samples=count) for count in (20_000, 320_000))
    np.testing.assert_allclose(few.half / many.half, 4, rtol=0.2)
    assert abs(many.mean - relative_gap(w, 2)) < 5 * many.half / 1.96


def expected_gap(rank, n):
    """For a column of any length in a direction at random: ρ² then has a beta distribution."""
    density = stats.beta(rank / 2, (n - rank) / 2)
    # By quantiles: at rank 1 the density has a pole.
    t = density.ppf((np.arange(20_000) + 0.5) / 20_000)
    return np.mean((h(np.sqrt(t)) - np.sqrt(t)) ** 2)


def test_with_the_inputs_the_expected_gap_approaches_the_gaussian_one():
    for rank, n in ((4, 16), (16, 64), (64, 256), (256, 1024)):
        assert abs(expected_gap(rank, n) / gaussian_gap(rank, n) - 1) < 2 / rank


def test_with_the_width_gaussian_matrices_approach_the_expected_gap():
    """ρ² tends to a beta distribution, and that to r/n as width and inputs grow at one ratio."""
    far = [
        abs(relative_gap(np.random.default_rng(0).standard_normal((16, m)), 4) / expected_gap(4, 16) - 1)
        for m in (64, 1024, 16_384)
    ]
    assert far[0] > 2 * far[1] > 4 * far[2]
    assert far[2] < 0.05
    w = np.random.default_rng(1).standard_normal((64, 8192))
    assert abs(relative_gap(w, 16) / gaussian_gap(16, 64) - 1) < 2 / 16 + 0.1


def test_the_gaussian_gap_is_its_formula():
    for rank, n in ((1, 4), (2, 128), (5, 10)):
        np.testing.assert_allclose(gaussian_gap(rank, n), (h(np.sqrt(rank / n)) - np.sqrt(rank / n)) ** 2, atol=1e-7)
    assert gaussian_gap(7, 7) == 0


@pytest.mark.parametrize(
    ("n", "tabled"), [(16, 0.022), (32, 0.037), *(pytest.param(*case, marks=slow) for case in [(64, 0.052), (128, 0.064)])]
)
def test_the_gap_at_rank_two_grows_with_the_inputs_as_tabled(n, tabled):
    """Means of five Gaussian matrices with m = n^1.5, computed elsewhere, to three digits."""
    w = np.random.default_rng(n).standard_normal((10, n, round(n**1.5)))
    gaps = np.asarray(jax.jit(jax.vmap(lambda w: relative_gap(w, 2)))(w))
    error = gaps.std(ddof=1) * math.sqrt(1 / 5 + 1 / 10)
    assert abs(gaps.mean() - tabled) < 4 * error + 0.0005


# --- how far any could go ---


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_of_the_rank_has_less_risk_than_the_bound(shape):
    _, _, bound, whole, risks = measured(*shape)
    for risk in risks.values():
        assert (bound <= risk + 1e-12 * whole).all()
    assert (bound > 0.5 * risks["refine"]).all()  # or nothing would do as well


def test_the_bound_holds_at_every_number_of_steps_and_tightens():
    bounds = [float(risk_bound(draw(3, 8, 12), 2, steps=steps)) for steps in (1, 3, 10)]
    _, _, best, _, risks = measured(8, 12, 2)  # the bound of 200 steps
    assert (np.diff([*bounds, best[3]]) >= 0).all()
    assert bounds[0] < best[3] <= risks["refine"][3]


def test_in_the_plane_the_bound_is_below_the_best_of_all_lines():
    w = draw(4, 2, 9)
    angles = np.linspace(0, np.pi, 2001)
    best = min(np.sum(np.sum(w**2, axis=0) * (1 - h(cosine) ** 2)) / 2 for cosine in lines_cosines(w, angles))
    bound = float(risk_bound(w, 1))
    assert bound <= best * (1 + 1e-6)
    # The envelope is above g by at most 0.015, and in the plane a projector of trace one has few rivals.
    assert bound > 0.7 * best


def lines_cosines(w, angles):
    length = np.linalg.norm(w, axis=0)
    for angle in angles:
        along = abs(np.array([np.cos(angle), np.sin(angle)]) @ w)
        yield np.clip(along / np.where(length > 0, length, 1), 0, 1)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 1)])
def test_at_full_rank_the_bound_is_zero(shape):
    w = np.random.default_rng(0).standard_normal(shape)
    assert 0 <= risk_bound(w, min(shape)) < 1e-12 * np.sum(w**2)


@pytest.mark.parametrize("shape", [(16, 16), *(pytest.param(shape, marks=slow) for shape in [(16, 64), (32, 20)])])
def test_in_float32_too_it_is_a_bound_where_it_is_tight(shape):
    rank = min(shape)

    @jax.jit
    @jax.vmap
    def both(w):
        u, v = matrix.kernel_projection(w, rank)
        return risk_bound(w, rank), matrix.risk(w, u @ v)

    drawn = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    bounds, risks = both(np.concatenate([drawn * np.float32(scale) for scale in (1e-25, 1.0, 1e15)]))
    assert bounds.dtype == np.float32
    assert (bounds >= 0).all()
    assert (bounds <= np.maximum(risks, 0)).all()


def test_float32_gives_the_bound_of_float64():
    wide = measured(8, 12, 2)[2][5]
    np.testing.assert_allclose(risk_bound(draw(5, 8, 12).astype(np.float32), 2), wide, rtol=1e-4)


def test_the_envelope_is_concave_and_the_least_above():
    t = np.linspace(0, 1, 4001)
    envelope, below = np.asarray(jax.jit(gap._concave)(t)), h(np.sqrt(t)) ** 2
    assert (np.diff(envelope, 2) <= 1e-14).all()
    assert (envelope >= below - 1e-14).all()
    touch = gap._touch()
    np.testing.assert_allclose(envelope[t <= touch], below[t <= touch], atol=1e-14)
    np.testing.assert_allclose(envelope[-1], 1, rtol=1e-12)
    # Beyond it is one chord from a point of the curve to another: nothing concave is below it.
    np.testing.assert_allclose(np.diff(envelope[t > touch], 2), 0, atol=1e-14)
    assert 0.18 < touch < 0.2
    assert max(envelope - below) < 0.016


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: risk_bound(np.ones((4, 6)), 2, steps=0), "steps must be a whole number from 1, got 0"),
        (lambda: sampled_gap(jax.random.key(0), np.ones((4, 6)), 2, samples=0), "samples must be a whole number from 1, got 0"),
        (lambda: gaussian_gap(5, 3), "rank 5 with 3 inputs: must be from 1 to 3"),
        (lambda: gaussian_gap(0, 3), "rank 0 with 3 inputs: must be from 1 to 3"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call", [relative_gap, risk_bound, lambda w, rank: sampled_gap(jax.random.key(0), w, rank)])
@pytest.mark.parametrize(
    ("change", "rank", "message"),
    [
        (lambda w: w, 0, "rank 0 of a 4x6 matrix: must be a whole number from 1 to 4"),
        (lambda w: w, 5, "rank 5 of a 4x6 matrix"),
        (lambda w: w[0], 1, r"expected a matrix \[n, m\], got shape \[6\]"),
        (lambda w: np.where(np.arange(6) == 2, np.nan, w), 1, "the 4x6 matrix contains non-finite values"),
    ],
)
def test_bad_input_gets_one_clear_error(call, change, rank, message):
    with pytest.raises(ValueError, match=message):
        call(change(np.ones((4, 6))), rank)
