"""plan, factorize, apply and merge on models whose authors never heard of low rank."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import DenseKernel, FactoredKernel
from lowrank_jax.projection import matrix
from tests import drawn

KEY = jax.random.key(0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16, name="down")(nn.relu(nn.Dense(32, name="up")(x))), None


class Zoo(nn.Module):
    """Setup and compact modules, scan over remat, a shared layer, attention, an embedding, convolutions of every kind."""

    def setup(self):
        self.conv = nn.Conv(16, (3, 3), strides=2)
        self.depthwise = nn.Conv(16, (3, 3), feature_group_count=16)
        self.grouped = nn.Conv(16, (3, 3), feature_group_count=4)
        self.shared = nn.Dense(16)
        self.embed = nn.Embed(5, 16)
        self.attention = nn.MultiHeadDotProductAttention(4, qkv_features=16)
        self.layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=5)()
        self.head = nn.Dense(10)

    def __call__(self, x):
        x = self.grouped(self.depthwise(self.conv(x)))
        x = x.reshape(x.shape[0], -1, 16) + self.embed(jnp.zeros((1,), int))
        x = self.shared(nn.relu(self.shared(x)))
        x, _ = self.layers(self.attention(x), None)
        return self.head(x.mean(1))


RULES = [
    lr.Rule("head/kernel"),
    lr.Rule("conv/kernel", scale=0.2, scheme="spatial", method="spectral", execution="merged"),
    lr.Rule(".*", scale=0.25),
]


@pytest.fixture(scope="module")
def zoo():
    model, x = Zoo(), np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    return model, x, drawn.variables(model, x)["params"], lr.plan(model, x, RULES)


@pytest.fixture(scope="module")
def factored(zoo):
    _, _, params, plan = zoo
    return lr.factorize(params, plan, key=KEY)


@pytest.fixture(scope="module")
def merged(factored):
    return jax.jit(lr.merge)(factored)


def by_name(plan):
    return {kernel.name: kernel for kernel in plan.kernels}


def test_every_kernel_is_in_the_plan_with_its_rank_or_its_reason(zoo):
    _, _, params, plan = zoo
    kernels = by_name(plan)
    notes = {name: kernel.note for name, kernel in kernels.items() if isinstance(kernel, DenseKernel)}
    assert notes == {
        "depthwise/kernel": "depthwise convolution",
        "grouped/kernel": "grouped convolution (4 groups)",
        "embed/embedding": "embedding: a rule with rows=... factors it",
        "head/kernel": "kept dense by rule 1",
    }
    ranks = {kernel.name: kernel.rank for kernel in plan.factored}
    assert ranks == {
        "conv/kernel": 2,  # 9 x 48
        "shared/kernel": 4,
        **{f"attention/{part}/kernel": 4 for part in ("query", "key", "value", "out")},
        "layers/up/kernel": 4,
        "layers/down/kernel": 4,
    }
    kernel_names = {name for name in named_leaves(params) if name.endswith(("kernel", "embedding"))}
    assert set(kernels) == kernel_names
    for text in ("depthwise convolution", "kernel_projection", "total"):
        assert text in str(plan)


def test_planned_parameters_are_those_that_factorize_makes(zoo, factored):
    _, _, params, plan = zoo
    assert sum(leaf.size for leaf in jax.tree.leaves(factored)) == plan.params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == plan.dense_params


def test_macs_are_counted_as_the_program_runs(zoo):
    kernels = by_name(zoo[3])
    assert kernels["conv/kernel"].macs == 4 * 4 * 3 * 3 * 3 * 16
    assert kernels["conv/kernel"].planned_macs == kernels["conv/kernel"].macs  # merged, it runs as the dense one
    assert kernels["shared/kernel"].macs == 2 * 16 * 16 * 16  # called twice on 16 positions
    assert kernels["layers/up/kernel"].macs == 5 * 16 * 16 * 32  # once in each of five layers


def test_paths_stay_and_factors_stand_where_kernels_stood(zoo, factored, merged):
    _, _, params, _ = zoo
    assert named_leaves(factored, is_leaf=is_low_rank).keys() == named_leaves(params).keys()
    assert factored["layers"]["up"]["kernel"].u.shape == (5, 16, 4)
    executions = {leaf.execution for leaf in jax.tree.leaves(factored, is_leaf=is_low_rank) if is_low_rank(leaf)}
    assert executions == {"factored", "merged"} and factored["conv"]["kernel"].execution == "merged"
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, params)


def test_apply_on_factors_is_the_plain_model_on_merged_kernels_and_gradients_reach_both_factors(zoo, factored, merged):
    model, x, *_ = zoo

    def loss(factored):
        logits = lr.apply(model, {"params": factored}, x)
        return (logits**2).sum(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(factored)
    plain = jax.jit(model.apply)({"params": merged}, x)
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
    assert jax.tree.structure(grads) == jax.tree.structure(factored)
    for name, grad in named_leaves(grads).items():
        if "/kernel" in name:
            assert np.abs(grad).max() > 0, name


def test_kernels_decompose_the_same_together_and_alone(zoo, merged):
    w = zoo[2]["layers"]["up"]["kernel"]
    alone = jax.jit(functools.partial(matrix.kernel_projection, rank=4))
    for i in range(5):
        u, v = alone(w[i])
        np.testing.assert_allclose(merged["layers"]["up"]["kernel"][i], np.asarray(u) @ np.asarray(v), atol=1e-5)


def test_factorize_is_deterministic_and_a_draw_depends_on_its_own_name_alone():
    model = nn.Sequential([nn.Dense(16) for _ in range(3)])
    params = drawn.variables(model, np.ones((1, 16)))["params"]

    def draw(pattern, key=KEY):
        plan = lr.plan(model, np.ones((1, 16)), [lr.Rule(pattern, scale=0.25, method="random")])
        factored = lr.factorize(params, plan, key=key)
        return {name: layer["kernel"].u for name, layer in factored.items() if is_low_rank(layer["kernel"])}

    many, few, other = draw(".*"), draw("layers_[12]/kernel"), draw(".*", jax.random.key(9))
    np.testing.assert_array_equal(many["layers_1"], few["layers_1"])
    assert not np.allclose(many["layers_1"], many["layers_2"])
    assert not np.allclose(many["layers_1"], other["layers_1"])


def test_factorize_runs_inside_jit_and_compiles_each_shape_once():
    model = nn.Sequential([nn.Dense(32) for _ in range(6)])
    x = np.ones((1, 32))
    plan = lr.plan(model, x, [lr.Rule(".*", scale=0.1)])
    params = drawn.variables(model, x)["params"]
    # One decomposition of the kernels, which is there again for those that need it twice, and two of one size to balance them.
    lowered = jax.jit(lambda p: lr.factorize(p, plan, key=KEY)).lower(params)
    text = lowered.as_text()
    assert 1 <= text.count("lapack_ssyevd_ffi") <= 4 and "lapack_sgesdd_ffi" not in text
    inside, outside = (run["layers_0"]["kernel"].u for run in (lowered.compile()(params), lr.factorize(params, plan, key=KEY)))
    np.testing.assert_allclose(inside, outside, atol=1e-5)


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return heads(8, name="heads")(x)


def test_vmapped_modules_are_stacked_and_counted_once_a_copy():
    model, x = Vmapped(), np.ones((2, 16), np.float32)
    plan = lr.plan(model, x, [lr.Rule(".*", rank=2, method="spectral")])
    assert by_name(plan)["heads/kernel"].macs == 3 * 16 * 8
    params = lr.factorize(drawn.variables(model, x)["params"], plan, key=KEY)
    run = jax.jit(lambda params: (lr.apply(model, {"params": params}, x), model.apply({"params": lr.merge(params)}, x)))
    np.testing.assert_allclose(*run(params), rtol=1e-5, atol=1e-6)


TEACH = ": a rule with rows=... factors its kernel, lr.register_layer teaches its class"


class Own(nn.Dense):
    """A layer that looks like nn.Dense and computes something else."""

    @nn.compact
    def __call__(self, inputs):
        return inputs @ self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features)) ** 2


@pytest.mark.parametrize(
    ("layer", "note"),
    [
        (Own(8), "Own replaces __call__ of Dense: a rule with rows=... factors its kernel"),
        (nn.ConvTranspose(8, (3, 3)), "ConvTranspose is not a known layer" + TEACH),
        (nn.ConvLocal(8, (3, 3)), "ConvLocal is not a known layer" + TEACH),
        (nn.Conv(8, (3, 3), mask=np.ones((3, 3, 8, 8))), "masked convolution"),
        (nn.Conv(8, (3, 3), conv_general_dilated=jax.lax.conv_general_dilated), "computes with its own conv_general_dilated"),
        (nn.DenseGeneral(8, batch_dims=0), "batch_dims is not supported"),
    ],
)
def test_what_cannot_be_factored_says_why(layer, note):
    x = jnp.ones((2, 8, 8, 8))
    assert lr.plan(layer, x, [lr.Rule(".*", rank=1)]).kernels[0].note == note


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        (lr.Rule("kernel", scale=1.0), "rank 8 would not be smaller"),
        (lr.Rule("kernel", rank=4), "rank 4 would not be smaller"),
        (lr.Rule("kernel", scale=0.6, multiple_of=16), "rank 16 is above full rank 8"),
    ],
)
def test_never_larger_than_dense(rule, note):
    assert lr.plan(nn.Dense(8), jnp.ones((1, 8)), [rule]).kernels[0].note == note


class Wrapped(nn.Module):
    """Layers that a wrapper or a lift keeps from running on factors, and one that it does not."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(16, name="normed"))(x)
        x = nn.SpectralNorm(nn.Dense(16, name="spectral"))(x, update_stats=False)
        scan = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=16)
        x, _ = scan(name="odd")(x, None)
        return nn.Dense(16, name="plain")(x)


def test_layers_that_do_not_run_on_factors_are_premerged_or_dense_and_say_so():
    model, x = Wrapped(), np.ones((2, 16), np.float32)
    plan = lr.plan(model, x, [lr.Rule(".*", rank=2, method="spectral")])
    assert {kernel.name: kernel.execution for kernel in plan.factored} == {
        "normed/kernel": "premerged",
        "spectral/kernel": "premerged",
        "odd/up/kernel": "premerged",  # as long as it is wide: only the program shows along which axis it is stacked
        "plain/kernel": None,
    }
    assert all(kernel.note for name, kernel in by_name(plan).items() if name != "plain/kernel")
    assert by_name(plan)["normed/kernel"].note == "the model does not run on its factors (ScopeParamNotFoundError)"

    def run(x):
        variables = model.init(KEY, x)
        params = lr.factorize(variables["params"], plan, key=KEY)
        return lr.apply(model, {**variables, "params": params}, x)

    assert jax.eval_shape(run, x).shape == (2, 16)


def test_a_model_with_drop_in_modules_can_be_planned():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32, name="plain")(lr.LowRankDense(16, rank=2, name="low")(x))

    model, x = Mixed(), np.ones((2, 16), np.float32)
    plan = lr.plan(model, x, [lr.Rule(".*", rank=2)])

    def run(x):
        params = lr.factorize(model.init(KEY, x)["params"], plan, key=KEY)
        return params, lr.apply(model, {"params": params}, x)

    params, y = jax.eval_shape(run, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == plan.params
    assert y.shape == (2, 32)


def test_a_kernel_that_no_rule_matches_stays_dense_and_says_so():
    model = nn.Sequential([nn.Dense(8), nn.Dense(8)])
    plan = lr.plan(model, jnp.ones((1, 8)), [lr.Rule("layers_0/kernel", rank=1)])
    factored, dense = plan.kernels
    assert isinstance(factored, FactoredKernel) and dense.note == "no rule matches"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([lr.Rule("layers_0/bias", rank=1)], "matches no parameter; the nearest is 'layers_0/kernel'"),
        ([lr.Rule("layer_0/kernel", rank=1)], "matches no parameter; the nearest is 'layers_0/kernel'"),
        ([lr.Rule(".*", rank=9)], "rank 9 is above full rank 8, the largest that it matches"),
    ],
)
def test_bad_plans_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        lr.plan(nn.Sequential([nn.Dense(8), nn.Dense(8)]), jnp.ones((1, 8)), rules)


def test_factorize_refuses_parameters_of_another_model(zoo, factored):
    _, _, params, plan = zoo
    other = {**params, "shared": {"kernel": np.ones((4, 4), np.float32)}}
    other.pop("conv")
    with pytest.raises(
        ValueError, match=r"(?s)conv/kernel: in the plan but not in the parameters.*planned as \[16, 16\], found \[4, 4\]"
    ):
        lr.factorize(other, plan, key=KEY)
    with pytest.raises(ValueError, match="already factored; merge first"):
        lr.factorize(factored, plan, key=KEY)


def test_inputs_may_be_several_and_abstract():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, a, b, *, scale):
            return scale * nn.Dense(32)(a + b)

    shape = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    plan = lr.plan(Two(), (shape, shape), [lr.Rule(".*", rank=1)], scale=2.0)
    assert (plan.dense_macs, plan.macs) == (32 * 32, 2 * 32)


def test_of_shapes_factorize_makes_shapes(zoo, factored):
    _, _, params, plan = zoo
    shapes = jax.eval_shape(lambda: params)
    made = lr.factorize(shapes, plan, key=KEY)
    assert jax.tree.structure(made) == jax.tree.structure(factored)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(made))
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(made)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(factored)
    ]
    moments = lr.inputs.moment_shapes(plan)
    assert lr.factorize(shapes, plan, key=KEY, moments=moments) == made
    with pytest.raises(ValueError, match="conv/kernel: in the plan but not in the parameters"):
        lr.factorize({name: layer for name, layer in shapes.items() if name != "conv"}, plan, key=KEY)
    with pytest.raises(ValueError, match="conv/kernel: has no moments"):
        lr.factorize(shapes, plan, key=KEY, moments={})


def test_kernels_that_are_not_finite_are_named(zoo):
    _, _, params, plan = zoo
    kernel = params["shared"]["kernel"].copy()
    kernel[0, 0] = np.nan
    broken = {**params, "shared": {**params["shared"], "kernel": kernel}}
    with pytest.raises(ValueError, match="kernels contain non-finite values: shared/kernel"):
        lr.factorize(broken, plan, key=KEY)


@pytest.mark.parametrize("activation", [nn.silu, nn.relu, lambda x: nn.silu(x)])
def test_a_function_after_kernels_of_several_shapes_is_that_activation(activation):
    model, x = nn.Sequential([nn.Dense(24), nn.silu, nn.Dense(16)]), jnp.ones((2, 20))
    params = model.init(jax.random.key(0), x)["params"]
    name = "relu" if activation is nn.relu else "silu"
    found, expected = (
        lr.merge(lr.factorize(params, lr.plan(model, x, [lr.Rule(".*kernel", rank=4, activation=act)]), key=jax.random.key(1)))
        for act in (activation, name)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3 if name == "relu" else 1e-6)  # a kink costs a series digits
