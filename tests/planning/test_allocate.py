"""Plans from a budget."""

import dataclasses
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.planning.allocate import allocate
from lowrank_jax.planning.budget import OBJECTIVES
from lowrank_jax.planning.curves import curves_of_kernels
from lowrank_jax.planning.plans import DenseKernel
from lowrank_jax.planning.rules import wanted_rank

X = jnp.ones((2, 8, 8, 3))
V5E = lr.chips.CHIPS["v5e"]
EVERYTHING = (lr.Rule(".*kernel", scale=1.0),)
WEIGHED = [objective for objective in OBJECTIVES if objective not in ("uniform", "divergence")]  # the last by gradients


class Net(nn.Module):
    """Kernels of many shapes: costs in parameters and in MACs order them differently."""

    @nn.compact
    def __call__(self, x):
        for features, window, strides in ((12, 3, 1), (24, 3, 2), (16, 1, 1)):
            x = nn.relu(nn.Conv(features, (window, window), strides)(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(5)(nn.relu(nn.Dense(20)(x)))


@pytest.fixture(scope="module")
def plan():
    return lr.plan(Net(), X, EVERYTHING)


@pytest.fixture(scope="module")
def variables():
    return Net().init(jax.random.key(3), X)


def risk_of(kernel):
    assert kernel.risk is not None  # a budget was allocated
    return kernel.risk


def loss(plan, objective):
    """What a plan loses of Gaussian kernels, from the curves."""
    curves = curves_of_kernels([kernel for kernel in plan.kernels if kernel.choices])
    losses = []
    for kernel in plan.factored:
        curve = curves[kernel.name][kernel.choices.index(kernel.choice)]
        lost = (curve.correlation if objective == "correlation" else curve.risk)[kernel.rank - 1]
        losses.append(lost * (1 if objective == "tolerance" else math.prod(kernel.stack)))
    return max(losses, default=0.0) if objective == "tolerance" else sum(losses)


@pytest.fixture(scope="module")
def uniform():
    """Plans of uniform scales, by growing scale."""
    return [lr.plan(Net(), X, [lr.Rule(".*kernel", scale=scale)]) for scale in np.arange(0.05, 1, 0.05)]


@pytest.mark.parametrize("objective", WEIGHED)
@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_it_holds_the_budget_and_loses_no_more_than_a_uniform_scale(plan, uniform, budget, objective):
    made = allocate(plan, params=budget, objective=objective)
    assert made.params <= budget * plan.dense_params < made.params + 0.06 * plan.dense_params
    rivals = [rival for rival in uniform if rival.params <= budget * plan.dense_params]
    assert rivals and loss(made, objective) <= min(loss(rival, objective) for rival in rivals) + 1e-9
    for kernel in made.factored:
        assert kernel.choice.params(kernel.rank) < kernel.params


@pytest.mark.parametrize("objective", WEIGHED)
def test_more_budget_never_loses_more(plan, objective):
    for kind in ("params", "macs"):
        losses = [loss(allocate(plan, **{kind: share}, objective=objective), objective) for share in np.linspace(0.1, 1, 12)]
        assert all(one >= other - 1e-12 for one, other in itertools.pairwise(losses)) and losses[-1] == 0


def test_macs_count_in_positions_and_fix_the_execution(plan):
    made = allocate(plan, macs=0.4)
    assert made.macs <= 0.4 * plan.dense_macs and made != allocate(plan, params=0.4)
    assert {kernel.execution for kernel in made.factored} == {"factored"}
    assert {kernel.execution for kernel in allocate(plan, params=0.4).factored} == {None}


def test_counts_and_fractions_bytes_and_both_at_once(plan):
    count = int(0.3 * plan.dense_params)
    assert allocate(plan, params=count).params <= count
    assert allocate(plan, bytes=0.3, itemsize=2).params == allocate(plan, params=0.3).params
    both = allocate(plan, params=0.5, macs=0.3)
    assert both.params <= 0.5 * plan.dense_params and both.macs <= 0.3 * plan.dense_macs


def test_the_whole_network_fits_the_whole_budget(plan):
    made = allocate(plan, params=1.0)
    assert not made.factored and made.params == plan.dense_params
    assert all(kernel.risk == 0 for kernel in made.kernels)


def test_rules_are_bounds():
    rules = [lr.Rule("Dense_1/kernel"), lr.Rule("Conv_0/kernel", rank=2), lr.Rule("Conv.*kernel", scale=0.25), *EVERYTHING]
    plan = lr.plan(Net(), X, rules)
    made = {kernel.name: kernel for kernel in allocate(plan, params=0.9).kernels}
    planned = {kernel.name: kernel for kernel in plan.kernels}
    assert made["Dense_1/kernel"] == planned["Dense_1/kernel"] and isinstance(made["Dense_1/kernel"], DenseKernel)
    for name in ("Conv_0/kernel", "Conv_1/kernel", "Conv_2/kernel"):
        assert made[name].rank <= wanted_rank(planned[name].rule, made[name].view)


def test_least_scales_and_multiples(plan):
    made = allocate(plan, params=0.35, min_scale=0.1, multiple_of=4)
    assert all(kernel.rank % 4 == 0 for kernel in made.factored if kernel.view.full_rank > 8)
    assert all(kernel.rank >= 0.1 * kernel.view.full_rank for kernel in made.factored)


def test_a_kernel_that_counts_more_keeps_more(plan):
    names = [kernel.name for kernel in plan.kernels if kernel.choices]
    usual = {kernel.name: risk_of(kernel) for kernel in allocate(plan, params=0.3).kernels}
    for name in names[:3]:
        made = allocate(plan, params=0.3, sensitivity={name: 50.0})
        heavy = {kernel.name: risk_of(kernel) for kernel in made.kernels}
        assert heavy[name] <= usual[name] and (heavy[name] < usual[name] or usual[name] == 0)


@pytest.mark.parametrize("objective", WEIGHED)
def test_a_kernel_that_nothing_feels_takes_what_is_left(plan, objective):
    names = [kernel.name for kernel in plan.kernels]
    everything = {"params": 1.0, "objective": objective}
    for zeros in (names[:1], names[-1:], names):
        made = allocate(plan, **everything, sensitivity=dict.fromkeys(zeros, 0.0))
        assert all(risk_of(kernel) == pytest.approx(0, abs=1e-6) for kernel in made.kernels)
    for objective_of_sums in {objective} - {"tolerance"}:
        made = allocate(plan, params=0.4, objective=objective_of_sums, sensitivity=dict.fromkeys(names, 0.0))
        usual = allocate(plan, params=0.4, objective=objective_of_sums)
        assert [(k.rank if not isinstance(k, DenseKernel) else None) for k in made.kernels] == [
            (k.rank if not isinstance(k, DenseKernel) else None) for k in usual.kernels
        ]


def test_trained_kernels_are_ranked_by_what_they_are(plan, variables):
    """A kernel of rank 2 needs no more, whatever its shape asks for."""
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    draw = np.random.default_rng(0)
    params["Dense_1"]["kernel"] = jnp.asarray(draw.normal(size=(256, 2)) @ draw.normal(size=(2, 20)), jnp.float32)
    made = {kernel.name: kernel for kernel in allocate(plan, params=0.3, variables={"params": params}).kernels}
    assert made["Dense_1/kernel"].rank == 2 and risk_of(made["Dense_1/kernel"]) < 1e-6
    assert {kernel.name: kernel for kernel in allocate(plan, params=0.3).kernels}["Dense_1/kernel"].rank > 2


def test_a_plan_that_was_allocated_runs(plan, variables):
    made = allocate(plan, macs=0.5, variables=variables)
    params = lr.factorize(variables["params"], made, key=jax.random.key(0))
    expected = Net().apply({"params": lr.merge(params)}, X)
    np.testing.assert_allclose(lr.apply(Net(), {"params": params}, X), expected, atol=1e-4)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == made.params


def test_seconds_choose_the_faster_execution(plan):
    chip = lr.chips.CHIPS["v5e"]
    made = allocate(plan, seconds=0.9, min_scale=0, chip=chip, batch=256, itemsize=2)
    assert {kernel.execution for kernel in made.factored} <= {"factored", "merged"} and made.factored
    with pytest.raises(ValueError, match="seconds needs chip"):
        allocate(plan, seconds=0.9)


def test_the_table_says_what_is_lost_and_what_more_would_buy(plan):
    made = allocate(plan, params=0.3)
    header, *rows = made.rows()
    assert header[-3:] == ["risk", "next 1%", "note"] and all(len(row) == len(header) for row in rows)
    assert plan.rows()[0][-1] == "note" and "risk" not in plan.rows()[0]
    lines = str(made).splitlines()
    starts = [lines[0].index(name) for name in ("rank", "risk", "next 1%", "note")]
    for kernel, line in zip(made.kernels, lines[1:], strict=False):
        assert kernel.risk is not None and f"<td>{kernel.risk:.4f}</td>" in made._repr_html_()
        assert line[starts[1] :].startswith(f"{kernel.risk:.4f}  ") and all(
            line[start - 2 : start] == "  " for start in starts[:3]
        )
        assert (kernel.next_gain is None) == (kernel.risk == 0)
        assert line[starts[2] :].startswith("-" if kernel.next_gain is None else f"{kernel.next_gain:.5f}")


def test_the_next_per_cent_is_what_the_best_next_rank_takes_off(plan):
    curves = curves_of_kernels([kernel for kernel in plan.kernels if kernel.choices])
    made = allocate(plan, params=0.3, objective="risk")
    more = 0.01 * 0.3 * plan.dense_params
    for kernel in made.factored:
        gains = []
        for choice, curve in zip(kernel.choices, curves[kernel.name], strict=True):
            for rank, risk in enumerate(curve.risk, start=1):
                needed = max((choice.params(rank) - kernel.planned_params) / more, 1)
                if choice.params(rank) < kernel.params:
                    gains.append((risk_of(kernel) - risk) / needed)
        gains.append(risk_of(kernel) / max((kernel.params - kernel.planned_params) / more, 1))
        np.testing.assert_allclose(kernel.next_gain, max(gains), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one budget, or two"),
        ({"variables": {}}, "give one budget, or two"),
        ({"params": 0.1, "macs": 0.1, "bytes": 0.1}, "give one budget, or two"),
        ({"params": 0.0}, "params=0.0 must be a fraction above 0 and up to 1, such as 0.5, or a whole number"),
        ({"macs": 1.5}, "macs=1.5 must be a fraction"),
        ({"params": True}, "params=True must be"),
        ({"seconds": 2}, "seconds=2 must be a fraction above 0 and up to 1$"),
        ({"params": 0.5, "objective": "risks"}, "unknown objective 'risks'; did you mean risk"),
        ({"params": 0.5, "min_scale": 2}, "min_scale 2 must be from 0 to 1"),
        ({"params": 0.5, "multiple_of": 0}, "multiple_of 0 must be a whole number"),
        ({"params": 0.5, "sensitivity": {"x" * 10_000: 1.0}}, r"'x{159} \.\.\. \(10002 characters\) is no kernel"),
        ({"params": 0.5, "sensitivity": {"Dense_7/kernel": 1.0}}, "'Dense_7/kernel' is no kernel that the plan's rules leave"),
        (
            {"params": 0.5, "sensitivity": {"Dense_0/kernel": -1.0}},
            "sensitivity of 'Dense_0/kernel': -1.0 must be at least 0",
        ),
        ({"params": 0.5, "sensitivity": {"Dense_0/kernel": np.nan}}, "sensitivity of 'Dense_0/kernel': nan must be"),
        ({"params": 0.5, "min_scale": "a"}, "min_scale 'a' must be from 0 to 1"),
        ({"params": 0.5, "moments": {}}, "moments need the variables too"),
        ({"params": 0.5, "variables": {"params": {}}}, "the variables do not fit the plan"),
        ({"params": 100}, r"the budget is impossible; params=100: the smallest possible is 0\.\d+ of the dense network, \d+"),
        ({"params": 0.3, "macs": 0.001}, r"impossible; .*macs=0\.001: the smallest possible is .*\(each for itself"),
    ],
)
def test_bad_budgets_are_refused(plan, arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(plan, **arguments)


def test_the_smallest_possible_budget_is_possible(plan):
    with pytest.raises(ValueError, match="impossible") as refused:
        allocate(plan, params=100)
    least = int(str(refused.value).rpartition("network, ")[2].replace(",", ""))
    assert allocate(plan, params=least).params == least
    with pytest.raises(ValueError, match="impossible"):
        allocate(plan, params=least - 1)


def test_unknown_macs_are_refused_by_name(plan):
    kernels = [dataclasses.replace(kernel, macs=0) if kernel.name == "Dense_0/kernel" else kernel for kernel in plan.kernels]
    with pytest.raises(ValueError, match="the MACs of Dense_0/kernel are not known"):
        allocate(dataclasses.replace(plan, kernels=tuple(kernels)), macs=0.5)


def test_numbers_of_numpy_and_jax_are_numbers(plan):
    assert allocate(plan, params=np.float32(0.5)) == allocate(plan, params=jnp.asarray(0.5)) == allocate(plan, params=0.5)
    assert allocate(plan, params=np.int64(3000), multiple_of=np.int32(2)) == allocate(plan, params=3000, multiple_of=2)


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="b")(nn.relu(nn.Dense(4, use_bias=False, name="a")(x)))


def test_what_fits_exactly_is_used():
    tiny = lr.plan(Tiny(), jnp.ones((2, 8)), EVERYTHING)
    made = {kernel.name: kernel for kernel in allocate(tiny, params=40).kernels}
    assert made["a/kernel"].rank == 2 and isinstance(made["b/kernel"], DenseKernel)


@pytest.mark.parametrize(
    "first", [{"macs": 0.5}, {"params": 0.2}, {"seconds": 0.9, "min_scale": 0, "chip": lr.chips.CHIPS["v5e"], "batch": 64}]
)
def test_a_former_budget_does_not_matter(plan, first):
    once = allocate(plan, **first)
    assert allocate(once, params=0.4) == allocate(plan, params=0.4) and allocate(once, **first) == once
    assert allocate(once, params=1.0) == allocate(plan, params=1.0)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(32, name="dense")(x)), None


class Repeated(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            x, _ = scan(name="layers")(x, None)
        else:
            for i in range(4):
                x, _ = Layer(name=f"layer{i}")(x, None)
        return nn.Dense(64, name="head")(x)


@pytest.mark.parametrize("budget", [0.3, 0.5])
def test_a_repeated_module_counts_as_often_as_it_is_there(budget):
    def ranks(scanned):
        plan = lr.plan(Repeated(scanned), jnp.ones((2, 32)), EVERYTHING)
        return {kernel.name: kernel.rank for kernel in allocate(plan, params=budget).factored}

    once, each = ranks(True), ranks(False)
    others = sorted(rank for name, rank in each.items() if name != "head/kernel")
    assert others[0] - 1 <= once["layers/dense/kernel"] <= others[-1] + 1
    assert abs(once["head/kernel"] - each["head/kernel"]) <= 4


def test_a_zero_kernel_loses_nothing(plan, variables):
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    params["Dense_1"]["kernel"] = jnp.zeros_like(params["Dense_1"]["kernel"])
    made = {kernel.name: kernel for kernel in allocate(plan, params=0.4, variables={"params": params}).kernels}
    assert made["Dense_1/kernel"].rank == 1 and made["Dense_1/kernel"].risk == 0


def test_real_inputs_count():
    model, x = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(24)]), np.random.default_rng(0).normal(size=(256, 32))
    x = jnp.asarray(x * np.where(np.arange(32) < 3, 10, 1e-3), jnp.float32)  # three inputs of any size
    variables, plan = model.init(jax.random.key(0), x), lr.plan(model, x, EVERYTHING)
    moments = lr.inputs.second_moments(model, variables, [x], plan.opened())
    isotropic = {kernel.name: kernel for kernel in allocate(plan, params=0.4, variables=variables).factored}
    seen = {kernel.name: kernel for kernel in allocate(plan, params=0.4, variables=variables, moments=moments).factored}
    assert seen["layers_0/kernel"].rank == 3 < isotropic["layers_0/kernel"].rank and risk_of(seen["layers_0/kernel"]) < 1e-3
    for wrong, message in (
        ({}, "layers_0/kernel: has no moments; capture them for plan.opened"),
        ({**moments, "nope": moments["layers_0/kernel"]}, "nope: has moments but is not open"),
        ({**moments, "layers_0/kernel": jnp.eye(7)}, r"layers_0/kernel: moments must have shape \[32, 32\], not \[7, 7\]"),
        ({**moments, "layers_0/kernel": jnp.full((32, 32), jnp.nan)}, "layers_0/kernel: moments contain non-finite values"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(plan, params=0.4, variables=variables, moments=wrong)


def test_variables_in_boxes_are_taken_and_shapes_are_not(plan, variables):
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), variables)
    assert allocate(plan, params=0.4, variables=boxed) == allocate(plan, params=0.4, variables=variables)
    with pytest.raises(ValueError, match="is a shape without values"):
        allocate(plan, params=0.4, variables=jax.eval_shape(lambda: variables))
    with pytest.raises(ValueError, match="is int32, not real numbers"):
        allocate(plan, params=0.4, variables=jax.tree.map(lambda leaf: leaf.astype(jnp.int32), variables))


def test_nothing_open_is_a_budget_of_its_own():
    closed = lr.plan(Net(), X, [])
    assert allocate(closed, params=1.0) == closed
    with pytest.raises(ValueError, match="the plan's rules leave no kernel open"):
        allocate(closed, params=0.5)


def test_under_an_outer_jit_plans_are_made_from_shapes(plan):
    made = []
    jax.jit(lambda x: made.append(allocate(plan, params=0.35)) or x)(1.0)
    assert made == [allocate(plan, params=0.35)]


def test_a_rule_below_the_least_scale_is_named():
    plan = lr.plan(Net(), X, [lr.Rule(".*kernel", scale=0.2)])
    with pytest.raises(ValueError, match=r"min_scale 0\.5 needs a rank of .*; its rule allows"):
        allocate(plan, params=0.9, min_scale=0.5)


@pytest.mark.parametrize("budget", [{"params": 0.2}, {"macs": 0.3}, {"params": 0.5, "macs": 0.4}])
def test_uniform_is_the_largest_common_scale_that_fits(plan, budget):
    found = lr.allocate(plan, **budget, objective="uniform")

    def fits(plan):
        return all(getattr(plan, kind) <= share * getattr(plan, f"dense_{kind}") for kind, share in budget.items())

    def at(scale):
        return lr.plan(Net(), X, [lr.Rule(".*kernel", scale=scale, execution="factored")])

    assert fits(found)
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    ranks = [{kernel.name: kernel.rank for kernel in plan.factored} for plan in (found, at(low))]
    assert ranks[0] == ranks[1]
