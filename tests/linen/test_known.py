"""Layers of other classes that run on factors once they are registered."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from scripts.third_party_zoo import OPTIMIZED_LSTM_CELL

X = np.random.default_rng(0).standard_normal((3, 5, 12)).astype(np.float32)


class ManyAxes(nn.Module):
    """As t5x has it: sums over some of the last axes; the kernel is stored flat in none of them."""

    features: int
    axis: Any = -1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        axes = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
        shape = (*(x.shape[axis] for axis in axes), self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.3), shape)
        return jax.lax.dot_general(x, kernel, ((tuple(a % x.ndim for a in axes), tuple(range(len(axes)))), ((), ())))


class Transposed(nn.Module):
    """As GPT-2's Conv1D: the kernel is stored `[out, in]`, and has a bias."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.3), (self.features, x.shape[-1]))
        return x @ kernel.T + self.param("bias", nn.initializers.normal(), (self.features,))


class Named(nn.Module):
    """Its kernel has another name."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("weight", nn.initializers.normal(0.3), (x.shape[-1], 8))


class Recurrent(nn.Module):
    """One step of flax's LSTM cell with its eight kernels."""

    @nn.compact
    def __call__(self, x):
        cell = nn.OptimizedLSTMCell(12, name="cell")
        _, y = cell(cell.initialize_carry(jax.random.key(0), x[:, 0].shape), x[:, 0])
        return y


CASES = {
    "last axis": (ManyAxes(8), {"cls": ManyAxes, "rows": lambda layer: (0,)}, (12, 8), 5 * 2 * (12 + 8)),
    "two axes": (
        ManyAxes(8, axis=(-2, -1)),
        {"cls": ManyAxes, "rows": lambda layer: range(1 if isinstance(layer.axis, int) else len(layer.axis))},
        (5, 12, 8),
        2 * (60 + 8),
    ),
    "transposed": (Transposed(8), {"cls": Transposed, "rows": 1}, (8, 12), 5 * 2 * (12 + 8)),
    "another name": (Named(), {"cls": Named, "kernel": "weight"}, (12, 8), 5 * 2 * (12 + 8)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_a_registered_layer_runs_as_it_does_on_the_product(register, case, execution):
    model, given, shape, macs = CASES[case]
    rules = [lr.Rule(".*", rank=2, execution=execution)]
    (before,) = lr.plan(model, X, rules).kernels
    note = "no known layer uses it" if case == "another name" else f"{type(model).__name__} is not a known layer"
    assert before.note.startswith(note)
    register(**given)
    plan = lr.plan(model, X, rules)
    (kernel,) = plan.factored
    assert (kernel.shape, kernel.execution) == (shape, execution)
    assert kernel.planned_macs == (macs if execution == "factored" else kernel.macs)
    variables = model.init(jax.random.key(0), X)
    params = lr.factorize(variables["params"], plan, key=jax.random.key(1))

    def of(run):
        return jax.value_and_grad(lambda params: jnp.sin(run(params)).sum())(params)

    (value, grads), (theirs, slopes) = (
        of(lambda params: model.apply({"params": lr.merge(params)}, X)),
        of(lambda params: lr.apply(model, {"params": params}, X)),
    )
    np.testing.assert_allclose(theirs, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), slopes, grads)


def test_moments_of_a_registered_layer_are_those_of_its_last_axes(register):
    register(Transposed, rows=1)
    model = Transposed(8)
    plan = lr.plan(model, X, [lr.Rule(".*", rank=2)])
    variables = model.init(jax.random.key(0), X)
    (moments,) = lr.inputs.second_moments(model, variables, [X], plan).values()
    rows = X.reshape(-1, 12).astype(np.float64)
    np.testing.assert_allclose(moments, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_a_layer_of_several_kernels_runs_as_its_user_says(register):
    register(**OPTIMIZED_LSTM_CELL)
    model = Recurrent()
    plan = lr.plan(model, X, [lr.Rule(".*/(ii|hf)/kernel", rank=2), lr.Rule(".*/h.*", rank=3)])
    assert {kernel.name: kernel.rank for kernel in plan.factored} == {
        "cell/ii/kernel": 2, "cell/hf/kernel": 2, "cell/hi/kernel": 3, "cell/hg/kernel": 3, "cell/ho/kernel": 3,
    }  # fmt: skip
    assert all(kernel.execution is None and kernel.macs == 0 for kernel in plan.factored)
    variables = model.init(jax.random.key(0), X)
    params = lr.factorize(variables["params"], plan, key=jax.random.key(1))
    merged = model.apply({"params": lr.merge(params)}, X)
    np.testing.assert_allclose(lr.apply(model, {"params": params}, X), merged, rtol=1e-5, atol=1e-6)


def test_a_subclass_of_a_registered_class_that_replaces_a_method_is_not_known(register):
    class Louder(Transposed):
        def param(self, name, init_fn, *args):
            return 2 * super().param(name, init_fn, *args)

    register(Transposed, rows=1)
    (kernel,) = lr.plan(Louder(8), X, [lr.Rule(".*", rank=2)]).kernels
    assert kernel.note.startswith("Louder replaces param of Transposed")


def layer_of(call):
    """A layer that computes `call(layer, x, kernel)`."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, **kwargs):
            kernel = self.param("kernel", nn.initializers.normal(0.3), (x.shape[-1], 12))
            return call(self, x, kernel, **kwargs)

    return Layer()


def sowing(layer, x, kernel):
    layer.sow("intermediates", "inputs", x)
    return x @ kernel


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda _, x, kernel: x @ kernel / np.sqrt(x.shape[-1]), "it computes with the size of its input"),
        (lambda _, x, kernel: (x - x.mean()) @ kernel, "it computes with the size of its input"),
        (lambda _, x, kernel: jnp.sin(x) @ kernel, "as its input is read by sin"),
        (lambda _, x, kernel: x @ (2 * kernel), "as its kernel is read by mul"),
        (lambda _, x, kernel: x @ kernel + x @ kernel, "as its input is read by dot_general"),
        (lambda _, x, kernel: x @ kernel.T.reshape(kernel.shape), "other numbers come out"),
        (lambda _, x, kernel: jnp.flip(x, -1) @ kernel, "as its input is read by rev"),
        (lambda _, x, kernel: jnp.clip(x, -100, 100) @ kernel, "as its input is read by"),
        (lambda _, x, kernel: x + x @ kernel, "it fails with other sizes (TypeError"),
        (lambda _, x, kernel: x @ kernel.T, "it fails with other sizes (TypeError"),
        (sowing, "it fails with other sizes (ValueError: writes to 'intermediates')"),
        (lambda _, x, kernel: nn.Dropout(0.5, deterministic=False)(x @ kernel), "it fails with other sizes (InvalidRngError"),
    ],
)
def test_a_layer_that_two_stages_would_change_is_not_run_in_two(register, call, why):
    model = layer_of(call)
    register(type(model))
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    (kernel,) = lr.plan(model, X, [lr.Rule(".*", rank=2)], rngs=rngs).kernels
    assert kernel.note.startswith(f"Layer does not run in two stages, {why}") and kernel.note.endswith("register it with run=")


@pytest.mark.parametrize("axis", [-2, (-1, -2)])
def test_axes_of_one_size_are_told_apart(register, axis):
    register(ManyAxes, rows=lambda layer: range(np.size(layer.axis)))
    (kernel,) = lr.plan(ManyAxes(8, axis=axis), np.ones((3, 12, 12)), [lr.Rule(".*", rank=2)]).kernels
    assert kernel.note.startswith("ManyAxes does not run in two stages, it fails with other sizes (ScopeParamShapeError")


class Squashing(nn.Module):
    @nn.compact
    def __call__(self, x, squash=False):
        kernel = self.param("kernel", nn.initializers.normal(0.3), (x.shape[-1], 12))
        return (jnp.tanh(x) if squash else x) @ kernel


def test_every_call_of_a_registered_layer_counts(register):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            layer = Squashing(name="layer")
            return layer(layer(x), squash=train)

    register(Squashing)
    rules = [lr.Rule(".*", rank=2)]
    assert lr.plan(Twice(), X, rules).factored
    for plan in (lr.plan(Twice(), X, rules, train=True), lr.plan(Twice(), X, rules, also=[{"train": True}])):
        assert "as its input is read by tanh" in plan.kernels[0].note


def test_moments_of_a_registered_layer_with_a_built_in_one_inside_are_of_its_own_inputs(register):
    class Rectified(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return nn.relu(super().__call__(inputs))

    register(Rectified)
    plan = lr.plan(Rectified(12), X, [lr.Rule("kernel", rank=2), lr.Rule(".*")])
    variables = Rectified(12).init(jax.random.key(0), X)
    (moments,) = lr.inputs.second_moments(Rectified(12), variables, [X], plan).values()
    rows = X.reshape(-1, 12)
    np.testing.assert_allclose(moments, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)


def test_what_a_user_runs_may_call_apply(register):
    def run(layer, params, x):
        return lr.apply(nn.Dense(12), {"params": {"kernel": params["kernel"], "bias": jnp.zeros(12)}}, x)

    model = layer_of(lambda _, x, kernel: x @ kernel)
    register(type(model), run=run)
    plan = lr.plan(model, X, [lr.Rule(".*", rank=2)])
    params = lr.factorize(model.init(jax.random.key(0), X)["params"], plan, key=jax.random.key(1))
    assert plan.factored[0].execution is None
    np.testing.assert_allclose(lr.apply(model, {"params": params}, X), X @ lr.merge(params)["kernel"], rtol=1e-4, atol=1e-5)


def test_other_arguments_reach_a_registered_layer_and_the_input_may_be_named(register):
    model = layer_of(lambda _, x, kernel, scale=1.0: scale * (x @ kernel))
    register(type(model))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return type(model)(name="layer")(scale=3.0, x=x)

    plan = lr.plan(Net(), X, [lr.Rule(".*", rank=2)])
    params = lr.factorize(Net().init(jax.random.key(0), X)["params"], plan, key=jax.random.key(1))
    assert plan.factored[0].execution is None
    np.testing.assert_allclose(lr.apply(Net(), {"params": params}, X), Net().apply({"params": lr.merge(params)}, X), rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((Transposed(8),), TypeError, "takes a class of flax.linen modules, not Transposed"),
        ((dict,), TypeError, "takes a class of flax.linen modules"),
        ((Named, ["a", "b"]), ValueError, "Named has 2 kernels: say with run="),
        ((Named, "weight", (1, 0)), ValueError, r"rows \(1, 0\) of Named must be axes of its kernel"),
        ((Named, "weight", -1), ValueError, r"rows \(-1,\) of Named must be axes of its kernel"),
    ],
)
def test_what_is_no_layer_is_refused(given, error, message):
    cls, *rest = given
    with pytest.raises(error, match=message):
        lr.register_layer(cls, **dict(zip(("kernel", "rows"), rest, strict=False)))
