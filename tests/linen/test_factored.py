"""Models that run on factors though something else calls them than lr.apply."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

import lowrank_jax as lr
from lowrank_jax.kernel import is_low_rank

X = np.random.default_rng(0).standard_normal((5, 10)).astype(np.float32)
KEY = jax.random.key(0)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="last")(nn.relu(nn.Dense(8, name="first")(x)))


class InSetup(nn.Module):
    """Its own method reads a kernel, which takes the product."""

    scaled: bool = True

    def setup(self):
        self.first, self.last = nn.Dense(8), nn.Dense(6)
        bound = self.scaled and self.has_variable("params", "first")
        self.scale = self.variables["params"]["first"]["kernel"].mean() if bound else 0.0

    def __call__(self, x):
        return self.scale + self.last(nn.relu(self.first(x)))

    def encode(self, x):
        return self.first(x)


class Wrapper:
    """As Hugging Face's models call their modules."""

    def __init__(self, module, params):
        self.module, self.params = module, params

    def __call__(self, x, params=None):
        return self.module.apply({"params": params or self.params}, x)


def factored_params(model, execution="factored"):
    params = model.init(KEY, X)["params"]
    plan = lr.plan(Compact(), X, [lr.Rule(".*kernel", rank=2)])
    params = lr.factorize(params, plan, key=KEY)
    return jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, execution=execution) if is_low_rank(leaf) else leaf, params, is_leaf=is_low_rank
    )


CALLS = {
    "apply": lambda model, params: model.apply({"params": params}, X),
    "bind": lambda model, params: model.bind({"params": params})(X),
    "nn.apply": lambda model, params: nn.apply(lambda module, x: module(x), model)({"params": params}, X),
    "wrapper": lambda model, params: Wrapper(model, params)(X),
    "jit": lambda model, params: jax.jit(Wrapper(model, params))(X),
    "jit of params": lambda model, params: jax.jit(lambda p: model.apply({"params": p}, X))(params),
    "lr.apply": lambda model, params: lr.apply(model, {"params": params}, X),
    "remat": lambda model, params: nn.remat(type(model))().apply({"params": params}, X),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("execution", ["factored", "merged", "premerged"])
def test_whatever_calls_the_model_runs_it_on_factors(call, execution):
    params = factored_params(Compact(), execution)
    with lr.factored():
        found = call(Compact(), params)
    expected = jax.jit(Compact().apply)({"params": lr.merge(params)}, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_without_it_flax_finds_another_shape():
    with pytest.raises(errors.ScopeParamShapeError):
        Compact().apply({"params": factored_params(Compact())}, X)


def test_setup_sees_the_product_of_premerged_factors_and_parts_can_be_called():
    model, params = InSetup(), factored_params(InSetup(), "premerged")
    dense = {"params": lr.merge(params)}
    with lr.factored():
        bound = model.bind({"params": params})
        encoded, inner, whole = bound.encode(X), bound.first(X), bound(X)
    plain = model.bind(dense)
    for found, expected in ((encoded, plain.encode(X)), (inner, plain.first(X)), (whole, plain(X))):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert is_low_rank(params["first"]["kernel"])  # the caller's tree is as it was


def test_a_bound_module_outlives_the_function_that_called_it_first():
    params = factored_params(InSetup(scaled=False), "premerged")
    with lr.factored():
        bound = InSetup(scaled=False).bind({"params": params})
        first = jax.jit(lambda x: bound.encode(x))(X)
        gradient = jax.grad(lambda x: bound(x).sum())(X)
        np.testing.assert_allclose(bound.encode(X), first, rtol=1e-5, atol=1e-5)
    plain = InSetup(scaled=False).bind({"params": lr.merge(params)})
    np.testing.assert_allclose(gradient, jax.grad(lambda x: plain(x).sum())(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", ["factored", "premerged"])
def test_gradients_are_those_of_lr_apply(execution):
    params = factored_params(Compact(), execution)

    def inside(params):
        with lr.factored():
            return Compact().apply({"params": params}, X).sum()

    found = jax.jit(jax.grad(inside))(params)
    expected = jax.grad(lambda params: lr.apply(Compact(), {"params": params}, X).sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("execution", ["factored", "premerged"])
def test_stacked_layers(execution):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(10, name="dense")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return blocks(name="blocks")(x, None)[0]

    rules = [lr.Rule(".*kernel", rank=2, execution=execution, rows=(0,))]
    params = lr.factorize(Stack().init(KEY, X)["params"], lr.plan(Stack(), X, rules), key=KEY)
    assert params["blocks"]["dense"]["kernel"].stack == (3,)
    with lr.factored():
        found = Stack().apply({"params": params}, X)
    np.testing.assert_allclose(found, Stack().apply({"params": lr.merge(params)}, X), rtol=1e-4, atol=1e-5)


def test_what_is_mutable_and_what_it_returns_are_as_ever():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))

    variables = Normalised().init(KEY, X)
    plan = lr.plan(Normalised(), X, [lr.Rule(".*kernel", rank=2, execution="premerged", rows=(0,))])
    params = lr.factorize(variables["params"], plan, key=KEY)
    with lr.factored():
        y, written = Normalised().apply({**variables, "params": params}, X, mutable=["batch_stats"])
    dense = {**variables, "params": lr.merge(params)}
    expected, updated = Normalised().apply(dense, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), written, updated)


def test_parameters_with_premerged_kernels_are_not_mutable():
    variables = nn.Dense(8).init(KEY, X)
    plan = lr.plan(nn.Dense(8), X, [lr.Rule("kernel", rank=2, execution="premerged"), lr.Rule(".*")])
    params = lr.factorize(variables["params"], plan, key=KEY)
    with pytest.raises(ValueError, match="premerged kernels cannot be mutable"):
        lr.apply(nn.Dense(8), {"params": params}, X, mutable=["params"])
    with lr.factored(), pytest.raises(ValueError, match="premerged kernels cannot be mutable"):
        nn.Dense(8).apply({"params": params}, X, mutable=True)


class Named(nn.Module):
    """Its arguments have the names that `apply` has itself."""

    @nn.compact
    def __call__(self, x, *, variables, model, args=0.0, train=False):
        self.sow("intermediates", "seen", variables)
        return variables + model + args + nn.Dense(8, name="first")(x)

    def double(self, x, **kwargs):
        return 2 * self(x, **kwargs)


@pytest.mark.parametrize("method", [None, "double", Named.double, Named().double])
def test_keyword_arguments_may_have_any_name(method):
    params = {"first": factored_params(Compact())["first"]}
    kwargs: dict = {"variables": jnp.ones(8), "model": 2.0, "args": 3.0}
    found, written = lr.apply(Named(), {"params": params}, X, method=method, mutable=["intermediates"], **kwargs)
    expected = (2 if method else 1) * (6 + lr.apply(nn.Dense(8), {"params": params["first"]}, X))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(written["intermediates"]["seen"][0], kwargs["variables"])
