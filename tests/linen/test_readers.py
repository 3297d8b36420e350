"""Kernels that something besides their layer reads: the function must be the same, whatever the execution."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.paths import named_leaves

X = np.random.default_rng(0).standard_normal((3, 8, 12)).astype(np.float32)
RULES = [lr.Rule(".*kernel", rank=2), lr.Rule(".*")]


def mapped(leafwise):
    """`nn.Dense` whose parameters pass a function, leaf by leaf."""
    return nn.map_variables(nn.Dense, "params", lambda tree: jax.tree.map(leafwise, tree), init=True)(12)


def column_of_ones(leaf):
    return leaf / jnp.linalg.norm(leaf, axis=0, keepdims=True) if leaf.ndim == 2 else leaf


CHANGED = {
    "halved": lambda a: a / 2,
    "upper triangle": lambda a: jnp.triu(a) if a.ndim == 2 else a,
    "clipped": lambda a: jnp.clip(a, -0.1, 0.1),
    "masked": lambda a: a * (jnp.arange(a.shape[0]) % 2)[:, None] if a.ndim == 2 else a,
    "rounded": lambda a: a + jax.lax.stop_gradient(jnp.round(8 * a) / 8 - a),
    "unit columns": column_of_ones,
    "another sign": lambda a: jnp.where(a > 0, a, -a),
    "cast": lambda a: a.astype(jnp.bfloat16).astype(jnp.float32),
    "flipped": lambda a: a[::-1],
    "permuted": lambda a: jnp.roll(a, 1, axis=-1),
}


@nn.nowrap
@jax.custom_vjp
def twice_the_gradient(leaf):
    return leaf


twice_the_gradient.defvjp(lambda leaf: (leaf, None), lambda _, grad: (2 * grad,))
CHANGED["another gradient"] = twice_the_gradient


class Wrapped(nn.Module):
    """A wrapper between two plain layers, and a plain one around the inputs."""

    wrapper: str

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(12, name="first")(x))
        if self.wrapper in CHANGED:
            x = mapped(CHANGED[self.wrapper])(x)
        elif self.wrapper == "weight norm":
            x = nn.WeightNorm(nn.Dense(12))(x)
        elif self.wrapper == "spectral norm":
            x = nn.SpectralNorm(nn.Dense(12))(x, update_stats=False)
        elif self.wrapper == "identity":
            x = mapped(lambda a: a)(x)
        elif self.wrapper == "remat":
            x = nn.remat(nn.Dense)(12)(x)
        elif self.wrapper == "jit":
            x = nn.jit(nn.Dense)(12)(x)
        return nn.Dense(5, name="last")(nn.tanh(x))


class Penalised(nn.Module):
    """Adds the sum of squares of all its parameters."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(12, name="layer")
        y = layer(x)
        return y + 1e-3 * sum(jnp.sum(a**2) for a in jax.tree.leaves(layer.variables))


class Turn(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(12)(x)), None


class Scanned(nn.Module):
    """Layers of their own in one loop, and one layer in another."""

    @nn.compact
    def __call__(self, x):
        x, _ = nn.scan(nn.remat(Turn), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        return nn.scan(Turn, variable_broadcast="params", split_rngs={"params": False}, length=2)()(x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(5)(x)


class Chosen(nn.Module):
    """A layer inside `nn.cond`."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(12)
        x = dense(x)
        return nn.cond(x.sum() > -1e9, lambda m, x: m(x), lambda m, x: m(x) * 2, dense, x)


class Stacked(nn.Module):
    """As many copies as there are inputs, stacked along the second axis: the kernel's shape alone does not tell which it is."""

    @nn.compact
    def __call__(self, x):
        copies = nn.vmap(nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=None, axis_size=12)
        return copies(5, name="copies")(x)


class Differentiated(nn.Module):
    """Adds what derivatives by a layer's parameters sum up to: of what the layer returns, or along a direction."""

    forward: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(12, name="layer")
        y = layer(x)
        if self.is_initializing():
            return y
        if self.forward:
            ones = jax.tree.map(jnp.ones_like, layer.variables["params"])
            return nn.jvp(lambda layer, x: layer(x), layer, (x,), (0 * x,), {"params": ones})[1]
        _, back = nn.vjp(lambda layer, x: layer(x), layer, x)
        rates, _ = back(jnp.ones_like(y))
        return y + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(rates))


class SometimesOnes(nn.Module):
    """One branch puts ones in the place of the parameters."""

    @nn.compact
    def __call__(self, x):
        def chosen(tree):
            return jax.lax.cond(x.sum() < 1e9, lambda tree: jax.tree.map(jnp.ones_like, tree), lambda tree: tree, tree)

        return nn.map_variables(nn.Dense, "params", chosen, init=True)(12)(x)


class JittedParts(nn.Module):
    """Two modules of one class, which JAX traces once."""

    @nn.compact
    def __call__(self, x):
        block = nn.jit(nn.Dense)
        return block(12, name="second")(nn.tanh(block(12, name="first")(x)))


class Standardised(nn.Conv):
    def param(self, name, *args, **kwargs):
        leaf = super().param(name, *args, **kwargs)
        return (leaf - leaf.mean((0, 1))) / leaf.std((0, 1)) if name == "kernel" else leaf


class Doubled(nn.Dense):
    def get_variable(self, col, name, default=None):
        return super().get_variable(col, name, default)

    def param(self, name, *args, **kwargs):
        return 2 * super().param(name, *args, **kwargs)


class Mixin:
    def param(self, name, *args, **kwargs):
        return -super().param(name, *args, **kwargs)


class Negative(Mixin, nn.DenseGeneral):
    pass


def net(make):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="last")(nn.tanh(make()(x)))

    return Net()


UNTOUCHED = [*map(Wrapped, ("identity", "remat", "jit", "none")), Scanned(), Mapped(), Chosen(), JittedParts()]
FOUND_OUT = [*map(Wrapped, (*CHANGED, "weight norm", "spectral norm")), Penalised(), SometimesOnes(), Stacked()]
FOUND_OUT += [Differentiated(forward=True), Differentiated(forward=False)]


def of_tangents(x, kernel, *args, **kwargs):
    return jax.lax.dot_general(x, jnp.tanh(kernel), *args, **kwargs)


REPLACED = [
    net(lambda: Standardised(12, (3,))),
    net(lambda: Doubled(12)),
    net(lambda: Negative(12)),
    net(lambda: nn.Dense(12, dot_general=of_tangents)),
]
MODELS = {
    f"{type(model).__name__} {getattr(model, 'wrapper', i)}": model for i, model in enumerate(UNTOUCHED + FOUND_OUT + REPLACED)
}


@pytest.mark.parametrize("rows", [None, pytest.param("all_but_last", marks=pytest.mark.slow)], ids=["", "rows"])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_and_its_gradient_do_not_depend_on_the_execution(name, rows):
    model = MODELS[name]
    variables = model.init(jax.random.key(0), X)
    rules = [dataclasses.replace(RULES[0], rows=rows), RULES[1]]
    plan = lr.plan(model, X, rules)
    params = lr.factorize(variables["params"], plan, key=jax.random.key(1))
    factored = [kernel.name for kernel in plan.factored]
    assert factored and (rows is None or len(factored) == len(plan.kernels))

    def slope(run, params):
        return jax.value_and_grad(lambda params: jnp.sin(3 * run(params)).sum())(params)

    def on_factors(params):
        return lr.apply(model, {**variables, "params": params}, X)

    @jax.jit  # in one program, which compiles faster than four
    def everything(params):
        found = {"plain": slope(lambda params: model.apply({**variables, "params": lr.merge(params)}, X), params)}
        for execution in ("factored", "merged", "premerged"):
            found[execution] = slope(on_factors, lr.with_execution(params, execution))
        return found

    others = everything(params)
    value, grad = others.pop("plain")
    for execution, (theirs, slopes) in others.items():
        np.testing.assert_allclose(theirs, value, rtol=2e-5, err_msg=execution)
        for (leaf, ours), slope in zip(named_leaves(grad).items(), jax.tree.leaves(slopes), strict=True):
            np.testing.assert_allclose(slope, ours, rtol=1e-3, atol=2e-4, err_msg=f"{execution} {leaf}")


@pytest.mark.parametrize("model", FOUND_OUT, ids=lambda model: getattr(model, "wrapper", str(model)))
def test_what_is_found_out_is_multiplied_before_the_model_and_nothing_else_is(model):
    plan = lr.plan(model, X, RULES)
    for kernel in plan.factored:
        expected = None if kernel.name.split("/")[0] in ("first", "last") else "premerged"
        assert kernel.execution == expected, kernel
        assert (kernel.note == "") == (expected is None)
    assert any(kernel.execution == "premerged" for kernel in plan.factored)


@pytest.mark.parametrize("model", UNTOUCHED, ids=lambda model: f"{type(model).__name__} {getattr(model, 'wrapper', '')}")
def test_what_only_passes_a_kernel_on_is_not_found_out(model):
    plan = lr.plan(model, X, RULES)
    assert plan.factored and all(kernel.execution is None for kernel in plan.factored)


def test_a_rule_that_insists_on_factors_leaves_such_a_kernel_dense_with_the_reason():
    plan = lr.plan(Wrapped("halved"), X, [lr.Rule(".*kernel", rank=2, execution="factored")])
    notes = {kernel.name: kernel.note for kernel in plan.kernels}
    assert notes["Map_variablesDense_0/kernel"] == "something besides its layer reads it (div) and cannot work on factors"
    assert {kernel.name for kernel in plan.factored} == {"first/kernel", "last/kernel"}


@pytest.mark.parametrize("model", REPLACED[:3], ids=["param", "get_variable", "mixin"])
def test_a_class_that_replaces_a_method_stays_dense_with_what_to_do(model):
    (kernel,) = (kernel for kernel in lr.plan(model, X, RULES).kernels if kernel.name != "last/kernel")
    assert "replaces " in kernel.note and "rows=" in kernel.note and kernel.macs == 0


def test_names_of_axes_are_bound_for_the_check():
    class OverDevices(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(12))(x)
            x = nn.BatchNorm(use_running_average=False, axis_name="devices")(x)
            return nn.Dense(5, name="last")(jax.lax.pmean(x, "hosts") if not self.is_initializing() else x)

    plan = lr.plan(OverDevices(), X, RULES)
    assert [kernel.execution for kernel in plan.factored] == ["premerged", None]


def test_a_model_that_does_not_run_says_so_itself():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            if not self.is_initializing():
                raise RuntimeError("no training without data")
            return nn.Dense(5)(x)

    with pytest.raises(RuntimeError, match="no training without data"):
        lr.plan(Broken(), X, RULES)


class InTraining(nn.Module):
    """Reads the layer's kernel as it trains."""

    @nn.compact
    def __call__(self, x, train=False):
        layer = nn.Dense(12, name="layer")
        y = layer(x)
        return y + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(layer.variables)) if train else y


def test_a_plan_is_for_all_calls_that_it_is_told():
    def execution(**kwargs):
        (kernel,) = lr.plan(InTraining(), X, RULES, **kwargs).factored
        return kernel.execution

    assert execution() is None and execution(train=True) == "premerged"
    assert execution(also=[{"train": False}]) is None and execution(also=[{"train": True}]) == "premerged"
    with pytest.raises(TypeError, match="unexpected keyword argument 'trian'"):
        execution(also=[{"trian": True}])


def plus_one(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    return y + 1 if isinstance(context.module, nn.Dense) and context.method_name == "__call__" else y


@pytest.mark.parametrize("execution", ["factored", "merged", "premerged"])
def test_somebody_elses_interceptor_sees_a_layer_once(execution):
    model = Wrapped("none")
    variables = model.init(jax.random.key(0), X)
    plan = lr.plan(model, X, [lr.Rule(".*kernel", rank=2, execution=execution), lr.Rule(".*")])
    params = lr.factorize(variables["params"], plan, key=jax.random.key(1))
    with nn.intercept_methods(plus_one):
        expected = model.apply({"params": lr.merge(params)}, X)
        np.testing.assert_allclose(lr.apply(model, {"params": params}, X), expected, rtol=1e-5, atol=1e-5)
    with lr.factored(), nn.intercept_methods(plus_one):
        if execution == "premerged":
            np.testing.assert_allclose(model.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="put it around"):
                model.apply({"params": params}, X)


def test_factors_of_another_matrix_are_refused():
    model = nn.Dense(12)
    variables = model.init(jax.random.key(0), X)
    turned = lr.plan(model, X, [lr.Rule("kernel", rank=2, rows=(1,)), lr.Rule(".*")])
    params = lr.factorize(variables["params"], turned, key=jax.random.key(1))
    np.testing.assert_allclose(
        lr.apply(model, {"params": params}, X), model.apply({"params": lr.merge(params)}, X), rtol=1e-5, atol=1e-5
    )
    pair = dataclasses.replace(params["kernel"], execution="factored")
    with pytest.raises(ValueError, match=r"kernel: has factors with rows \(1,\), and a Dense runs on rows \(0,\)"):
        lr.apply(model, {"params": {**params, "kernel": pair}}, X)
    with pytest.raises(ValueError, match=r"kernel: is a pair with rows \(1,\), the plan has rows \(0,\)"):
        lr.with_execution(params, lr.plan(model, X, RULES))


class Sowing(nn.Module):
    """Reads its layer's kernel in other ways of being called."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(12, name="layer")
        y = layer(x)
        if self.is_mutable_collection("penalties") and not self.is_initializing():
            self.sow("penalties", "squares", sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(layer.variables)))
        return y

    @nn.compact
    def penalty(self, x):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(self.variables["params"]))


def test_other_methods_and_collections_are_other_calls():
    def execution(*also):
        (kernel,) = lr.plan(Sowing(), X, RULES, also=also).factored
        return kernel.execution

    assert execution() is None
    assert execution({"mutable": ["penalties"]}) == execution({"method": "penalty"}) == "premerged"
    with pytest.raises(TypeError, match="also takes a list of dicts"):
        lr.plan(Sowing(), X, RULES, also={"train": True})


class Teaching(nn.Module):
    """Calls another model on factors."""

    @nn.compact
    def __call__(self, x):
        teacher = nn.Dense(12)
        pair = lr.LowRankKernel(jnp.ones((12, 2)), jnp.ones((2, 12)))
        return nn.Dense(12, name="layer")(x) + lr.apply(teacher, {"params": {"kernel": pair, "bias": jnp.zeros(12)}}, x)


def test_plans_within_lr_factored_and_of_models_that_call_apply_are_as_elsewhere():
    expected = lr.plan(Wrapped("none"), X, RULES)
    with lr.factored():
        assert lr.plan(Wrapped("none"), X, RULES) == expected
        assert [kernel.execution for kernel in lr.plan(Teaching(), X, RULES).factored] == [None]
    variables = Teaching().init(jax.random.key(0), X)
    params = lr.factorize(variables["params"], lr.plan(Teaching(), X, RULES), key=jax.random.key(1))
    y = lr.apply(Teaching(), {"params": params}, X)
    np.testing.assert_allclose(y, Teaching().apply({"params": lr.merge(params)}, X), rtol=1e-4, atol=1e-4)


class Gelu(nn.Module):
    def __call__(self, x):
        return nn.gelu(x)


GELU = Gelu()


class WithHelper(nn.Module):
    """Calls a module without parameters that belongs to nobody; its arguments are no arrays, or have any name."""

    @nn.compact
    def __call__(self, *, variables, dtype=None, train=False):
        x = GELU(nn.Dense(12, dtype=dtype, name="layer")(variables))
        return 2 * x if train else x


def test_arguments_of_any_name_and_kind_are_passed_on():
    plan = lr.plan(WithHelper(), (), RULES, variables=X, dtype=np.float32, train=np.bool_(True))
    assert [(kernel.name, kernel.execution) for kernel in plan.factored] == [("layer/kernel", None)]
    params = lr.factorize({"layer": nn.Dense(12).init(jax.random.key(0), X)["params"]}, plan, key=jax.random.key(1))
    dense = lr.merge(params)["layer"]
    expected = nn.gelu(X @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(lr.apply(WithHelper(), {"params": params}, variables=X), expected, rtol=1e-4, atol=1e-5)
