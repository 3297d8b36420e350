"""What tracing sees of a model: its kernels, and how much work each does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr

X = np.ones((4, 8), np.float32)
ONE = 8 * 8  # MACs of a layer, per example


class Loops(nn.Module):
    """One layer called again and again, by different loops."""

    loop: str

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, name="layer")
        x = layer(x)
        if self.loop == "calls":
            x = layer(layer(x))
        elif self.loop == "scan":
            turns = nn.scan(lambda layer, x, _: (layer(x), None), variable_broadcast="params", length=5)
            x, _ = turns(layer, x, None)
        elif self.loop == "branches":
            other = nn.Dense(8, name="other")
            other(x)
            x = nn.cond(x.sum() > 0, lambda a, b, x: a(b(x)), lambda a, b, x: a(x), layer, other, x)
        elif self.loop == "while":
            x = nn.while_loop(lambda _, x: x.sum() > 1, lambda layer, x: layer(x), layer, x, broadcast_variables="params")
        return x


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        ("none", {"layer": ONE}),
        ("calls", {"layer": 3 * ONE}),
        ("scan", {"layer": 6 * ONE}),
        ("branches", {"layer": 2 * ONE, "other": 2 * ONE}),  # one of the branches runs
        ("while", {"layer": 0}),  # nobody knows how often
    ],
)
def test_macs_are_counted_as_often_as_a_layer_runs(loop, expected):
    plan = lr.plan(Loops(loop), X, [lr.Rule(".*", rank=2)])
    assert {kernel.name.removesuffix("/kernel"): kernel.macs for kernel in plan.kernels} == expected
    assert ("not known" in str(plan)) == (loop == "while")


class Shared(nn.Module):
    """Modules of one class, whose program JAX traces once."""

    @nn.compact
    def __call__(self, x):
        block = nn.jit(nn.Dense)
        return block(8, name="third")(block(8, name="second")(x))


def test_modules_that_share_a_program_have_their_own_macs():
    plan = lr.plan(Shared(), X, [lr.Rule("second/kernel", rank=2), lr.Rule(".*")])
    assert [(kernel.name, kernel.macs) for kernel in plan.kernels] == [("second/kernel", ONE), ("third/kernel", ONE)]


class Reshaped(nn.Module):
    """A parameter that is applied at ten positions, and is no kernel of a known layer."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.normal(), (8, 8))
        return (x.reshape(-1, 1, 8) * jnp.ones((10, 1))) @ table


def test_macs_of_what_is_no_layer_are_not_known():
    plan = lr.plan(Reshaped(), X, [lr.Rule(".*", rows="all_but_last", rank=2)])
    (kernel,) = plan.factored
    assert (kernel.macs, kernel.planned_macs, plan.macs) == (0, 0, 0) and kernel.row()[6] == "-"


def test_a_layer_that_runs_once_a_batch_has_macs():
    class OnMeans(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x.mean(0))

    (kernel,) = lr.plan(OnMeans(), np.ones((64, 8)), []).kernels
    assert kernel.macs == 1


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_inputs_are_refused(shape):
    with pytest.raises(ValueError, match=r"an input of shape \[.*0.*\] is empty"):
        lr.plan(nn.Dense(8), np.ones(shape), [])


def test_a_layer_without_output_positions_has_unknown_macs():
    (kernel,) = lr.plan(nn.Conv(4, (3, 3), padding="VALID"), np.ones((2, 2, 2, 3)), []).kernels
    assert kernel.macs == 0


@pytest.mark.parametrize("dtype", ["int8", "int32", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("rows", [None, (0,)])
def test_only_real_numbers_are_factored(dtype, rows):
    class Table(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", lambda _, shape: jnp.ones(shape, dtype), (8, 8))
            return x @ jnp.real(kernel).astype(x.dtype)

    (kernel,) = lr.plan(Table(), X, [lr.Rule(".*", rank=2, rows=rows)]).kernels
    assert kernel.note == f"{dtype} is none of float32, bfloat16, float16, float64"


def test_names_that_stand_for_two_parameters_are_refused():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="b")(x)

    class Slashed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="a/b")(Inner(name="a")(x))

    with pytest.raises(ValueError, match="two arrays are called 'params/a/b/"):
        lr.plan(Slashed(), X, [lr.Rule(".*", rank=2)])


def test_rows_that_nothing_has_are_refused():
    with pytest.raises(ValueError, match=r"rule 'kernel': \[8, 8\] has no axes \(2,\), which the rule names as its rows"):
        lr.plan(nn.Dense(8), X, [lr.Rule("kernel", rank=2, rows=(2,)), lr.Rule(".*")])


def test_a_bias_is_factored_where_a_rule_with_rows_calls_it_so():
    class Biased(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(12, name="layer")(x)[:, None] + self.param("bias", nn.initializers.normal(), (8, 12))

    named = [lr.Rule("bias", rank=2, rows=(0,)), lr.Rule(".*", rank=2)]
    assert [kernel.name for kernel in lr.plan(Biased(), X, named).factored] == ["layer/kernel", "bias"]
    everything = [lr.Rule(".*", rank=2, rows="all_but_last")]
    assert [kernel.name for kernel in lr.plan(Biased(), X, everything).factored] == ["layer/kernel"]


class CalledKernel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="embedding")(nn.Dense(8, name="kernel")(x))


def test_a_module_may_have_the_name_of_a_kernel():
    x = jnp.ones((2, 12))
    made = lr.plan(CalledKernel(), x, [lr.Rule("kernel/kernel", rank=2)])
    assert [kernel.name for kernel in made.factored] == ["kernel/kernel"] and made.dense_params == 12 * 8 + 8 + 8 * 3 + 3
    params = CalledKernel().init(jax.random.key(0), x)["params"]
    low = lr.factorize(params, made, key=jax.random.key(1))
    expected = CalledKernel().apply({"params": lr.merge(low)}, x)
    np.testing.assert_allclose(lr.apply(CalledKernel(), {"params": low}, x), expected, atol=1e-5)
