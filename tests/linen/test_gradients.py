"""Gradients at the kernels, against jacobians with respect to them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.inputs import CURVATURES
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.curves import curves_of_kernels
from tests.projection.reference import normal

KEY = jax.random.key(0)
RULES = [lr.Rule(".*kernel", rank=2, method="two_sided")]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="conv")(x))
        x = nn.relu(nn.DenseGeneral((2, 4), axis=(-1,), name="general")(x))
        x = nn.tanh(nn.Dense(5, name="dense")(x.mean((1, 2)).reshape(-1, 8)))
        return nn.Dense(4, use_bias=False, name="head")(x)


IMAGES = normal(0, 7, 6, 6, 3)


def per_label(label):
    """Of one label, in proportion to its probability: summed over labels, the gradients are the Fisher information exactly."""

    def cotangents(outputs, key):
        p = jax.nn.softmax(outputs)
        chosen = p[..., label : label + 1]
        return jnp.sqrt(chosen) * (p - jax.nn.one_hot(label, outputs.shape[-1]))

    return cotangents


def raw(found, plan):
    """E SSᵀ and E SᵀS themselves."""
    groups = {kernel.name: kernel.view.group for kernel in plan.captured}

    def of(name, rows, columns):
        size = groups[name] * np.trace(np.asarray(columns, np.float64), axis1=-2, axis2=-1)[..., None, None]
        np.testing.assert_allclose(np.trace(rows, axis1=-2, axis2=-1), 1, rtol=1e-5)
        return size * np.asarray(rows, np.float64), groups[name] * np.asarray(columns, np.float64)

    return {name: of(name, *sides) for name, sides in found.items()}


def exact(model, variables, batches, plan, classes, **kwargs):
    found = [
        raw(lr.inputs.gradient_moments(model, variables, batches, plan, key=KEY, loss=per_label(c), **kwargs), plan)
        for c in range(classes)
    ]
    return {name: tuple(sum(parts) for parts in zip(*(one[name] for one in found), strict=True)) for name in found[0]}


def planned(model, *args, rules=RULES):
    return lr.plan(model, *args, rules)


def by_jacobians(model, variables, examples, plan):
    """E SSᵀ and E SᵀS over all labels, example by example, from the jacobian at the kernels themselves."""
    found = {}
    for example in examples:
        call = lambda params, example=example: model.apply({"params": params}, example[None])[0]  # noqa: E731
        p = np.asarray(jax.nn.softmax(call(variables["params"])), np.float64)
        fisher = np.diag(p) - np.outer(p, p)
        jacobian = named_leaves(jax.jacrev(call)(variables["params"]))
        for kernel in plan.captured:
            stack = kernel.stack
            s = np.stack([np.asarray(kernel.view.to_matrix(j), np.float64) for j in jacobian[kernel.name]])
            s = s.reshape(len(p), *stack, kernel.view.n, kernel.view.group, -1)
            rows = np.einsum("k...ngm,kl,l...hgm->...nh", s, fisher, s)
            columns = np.einsum("k...ngm,kl,l...ngo->...mo", s, fisher, s)
            old = found.get(kernel.name, (0, 0))
            found[kernel.name] = old[0] + rows / len(examples), old[1] + columns / len(examples)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, sides in expected.items():
        for one, other in zip(found[name], sides, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("side", [6, 22])  # many positions and few
def test_they_are_the_fisher_information_at_every_kernel(scheme, side):
    images = normal(0, 5, side, side, 3)
    model = Net()
    variables = jax.tree.map(lambda a: 2 * a, model.init(KEY, images))
    plan = planned(model, images, rules=[lr.Rule(".*kernel", rank=2, scheme=scheme, method="two_sided")])
    found = exact(model, variables, [images[:3], images[3:]], plan, 4)
    assert_same(found, by_jacobians(model, variables, images, plan))


def test_drawn_ones_are_near_and_unbiased_and_the_key_decides():
    model = Net()
    variables, plan = model.init(KEY, IMAGES), planned(model, IMAGES)
    expected = exact(model, variables, [IMAGES], plan, 4)
    drawn = lr.inputs.gradient_moments(model, variables, [IMAGES], plan, key=KEY, draws=300)
    again = lr.inputs.gradient_moments(model, variables, [IMAGES], plan, key=KEY, draws=300)
    for name, sides in raw(drawn, plan).items():
        for moment, wanted in zip(sides, expected[name], strict=True):
            error = np.linalg.norm(moment - wanted) / np.linalg.norm(wanted)
            assert error < 0.15, name  # 2,100 predictions; a wrong curvature is off by its own size
        jax.tree.map(np.testing.assert_array_equal, drawn[name], again[name])


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "squared"])
def test_random_signs_have_the_curvature_for_covariance(loss, monkeypatch):
    outputs = jnp.array([1.0, -0.5, 0.3])
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T
    drawn = []
    for z in signs:
        monkeypatch.setattr(jax.random, "rademacher", lambda key, shape, dtype, z=z: jnp.asarray(z, dtype))
        drawn.append(np.asarray(CURVATURES[loss](outputs, KEY), np.float64))
    hessians = {
        "softmax": jax.hessian(jax.nn.logsumexp)(outputs),
        "sigmoid": jax.hessian(lambda x: jax.nn.softplus(x).sum())(outputs),
        "squared": np.eye(3),
    }
    np.testing.assert_allclose(np.mean([np.outer(g, g) for g in drawn], axis=0), hessians[loss], atol=1e-6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6, name="dense")(x)), None


class Scanned(nn.Module):
    stacked: bool

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0, lr.inputs.COLLECTION: 0}} if self.stacked else {"variable_broadcast": "params"}
        rngs = {"params": self.stacked}
        body = nn.remat(Block)
        x, _ = nn.scan(body, split_rngs=rngs, length=3, **axes)(name="blocks")(x, None)
        return nn.Dense(3, use_bias=False, name="head")(x)


@pytest.mark.parametrize("stacked", [True, False])
def test_members_of_a_stack_have_their_own_and_turns_of_a_loop_are_independent(stacked):
    model, x = Scanned(stacked), normal(1, 5, 6)
    variables = model.init(KEY, x)
    plan = planned(model, x)
    found = exact(model, variables, [x], plan, 3)
    if stacked:
        assert_same(found, by_jacobians(model, variables, x, plan))
        return
    rows, columns = np.zeros((6, 6)), np.zeros((6, 6))
    params: Any = variables["params"]
    for row in x:  # the gradient of each turn by itself

        def unrolled(kernels, row=row):
            y = row
            for kernel in kernels:
                y = jnp.tanh(y @ kernel + params["blocks"]["dense"]["bias"])
            return y @ params["head"]["kernel"]

        kernels = [params["blocks"]["dense"]["kernel"]] * 3
        p = np.asarray(jax.nn.softmax(unrolled(kernels)))
        fisher = np.diag(p) - np.outer(p, p)
        for s in jax.jacrev(unrolled)(kernels):
            rows += np.einsum("knm,kl,lhm->nh", s, fisher, s) / len(x)
            columns += np.einsum("knm,kl,lno->mo", s, fisher, s) / len(x)
    assert_same({"blocks": found["blocks/dense/kernel"]}, {"blocks": (rows, columns)})


def divergence(model, x, dense, low):
    """Measured, in float64."""
    outputs = (np.asarray(lr.apply(model, {"params": p}, x), np.float64) for p in (dense, low))
    logs = [y - np.log(np.exp(y).sum(-1, keepdims=True)) for y in outputs]
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_of_small_random_errors_the_mean_divergence_is_as_predicted(scheme):
    """In single directions the two sides know only a part; their mean over all directions is exact."""
    model, x = Net(), normal(3, 60, 6, 6, 3)
    variables = jax.tree.map(lambda a: 2 * a, model.init(KEY, x))
    params = variables["params"]
    plan = planned(model, x[:1], rules=[lr.Rule(".*kernel", rank=2, scheme=scheme, method="two_sided")])
    found = raw(lr.inputs.gradient_moments(model, variables, [x], plan, key=KEY, draws=40), plan)
    for name, (rows, _) in found.items():
        layer, size = name.split("/")[0], 3e-3
        kernel = params[layer]["kernel"]
        measured = []
        for draw in range(24):
            signs = size * jax.random.rademacher(jax.random.key(draw), kernel.shape, kernel.dtype)
            low = {**params, layer: {**params[layer], "kernel": kernel + signs}}
            measured.append(divergence(model, x, params, low))
        error = np.std(measured) / len(measured) ** 0.5 + 0.1 * np.mean(measured)  # of the draws on either side
        assert abs(np.mean(measured) - 0.5 * size**2 * np.trace(rows)) < 3 * error, name


def test_the_second_order_says_what_the_network_loses():
    """Where little is lost, within a factor of two."""
    model, x = Net(), normal(3, 200, 6, 6, 3)
    variables = jax.tree.map(lambda a: 2 * a, model.init(KEY, x))
    plan = lr.plan(model, x[:1], [lr.Rule(".*kernel", scale=1.0, method="two_sided")])
    data = {"gradients": lr.inputs.gradient_moments(model, variables, [x], plan.opened(), key=KEY, draws=20)}
    made = lr.allocate(plan, params=0.9, variables=variables, **data)
    params = lr.factorize(variables["params"], made, key=KEY, **data)
    measured = divergence(model, x, variables["params"], params)
    predicted = sum(kernel.divergence for kernel in made.kernels)
    assert measured / 2 < predicted < 2 * measured
    table = made.rows()
    assert table[0][-4:-1] == ["risk", "divergence", "next 1%"] and float(table[-1][-3]) == pytest.approx(predicted, abs=1e-5)
    alike = lr.allocate(lr.plan(model, x[:1], [lr.Rule(".*kernel", scale=1.0)]), params=0.9, variables=variables)
    assert all(kernel.divergence is None for kernel in alike.kernels)
    spectral = lr.allocate(plan, params=0.9, objective="uniform", variables=variables, **data)
    assert predicted <= sum(kernel.divergence for kernel in spectral.kernels)


def test_a_sensitivity_corrects_what_is_expected():
    """Of each kernel by itself it is what is measured where it was measured."""
    model, x = Net(), normal(3, 100, 6, 6, 3)
    variables = jax.tree.map(lambda a: 2 * a, model.init(KEY, x))
    plan = planned(model, x[:1])
    gradients = lr.inputs.gradient_moments(model, variables, [x], plan, key=KEY)
    factors = lr.sensitivity(model, variables, [x[:50], x[50:]], plan, gradients=gradients)
    low = lr.merge(lr.factorize(variables["params"], plan, key=KEY, gradients=gradients))
    curves = curves_of_kernels(plan.factored, variables, gradients=gradients)
    assert factors.keys() == {kernel.name for kernel in plan.factored}
    for name, factor in factors.items():
        layer, expected = name.split("/")[0], curves[name][0].divergence[1]
        assert divergence(model, x, variables["params"], {**variables["params"], layer: low[layer]}) == pytest.approx(
            factor * expected, rel=1e-3
        )
    corrected = lr.allocate(plan, params=0.9, variables=variables, gradients=gradients, sensitivity=factors)
    for kernel in corrected.factored:
        assert kernel.divergence == pytest.approx(factors[kernel.name] * curves[kernel.name][0].divergence[kernel.rank - 1])


def test_bad_input_gets_one_clear_error():
    model = Net()
    variables, plan = model.init(KEY, IMAGES), planned(model, IMAGES)
    measure = lambda **changes: lr.inputs.gradient_moments(model, variables, [IMAGES], plan, **{"key": KEY, **changes})  # noqa: E731
    for changes, message in (
        ({"loss": "softmaks"}, "unknown loss 'softmaks'; did you mean softmax"),
        ({"draws": 0}, "draws 0 must be a whole number of at least 1"),
        ({"draws": 1.5}, "draws 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(**changes)
    for changes, message in (
        ({"key": 3}, "key must be"),
        ({"logits": 3}, "logits must be a function"),
        ({"logits": lambda y: {}}, "no array of outputs"),
    ):
        with pytest.raises(TypeError, match=message):
            measure(**changes)
    gradients, params = measure(), variables["params"]
    rows, columns = gradients["head/kernel"]
    for given, message in (
        (None, "needs gradients"),
        ({**gradients, "head/kernel": (rows, jnp.eye(3))}, r"head/kernel: gradients must have rows and columns of shapes"),
        ({**gradients, "head/kernel": columns}, "head/kernel: gradients must be a pair of rows and columns"),
        ({**gradients, "head/kernel": (rows, "no")}, "head/kernel: columns of gradients: must be an array"),
        ({**gradients, "hat/kernel": (rows, columns)}, "hat/kernel: has data"),
        ({**gradients, "head/kernel": (rows, -columns)}, "columns of gradients: moments must be positive semidefinite"),
        ({**gradients, "head/kernel": (jnp.nan * rows, columns)}, "rows of gradients: moments contain non-finite values"),
        ({name: sides for name, sides in gradients.items() if name != "head/kernel"}, "head/kernel: has no gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            lr.factorize(params, plan, key=KEY, gradients=given)
    other = lr.plan(model, IMAGES, [lr.Rule(".*kernel", rank=2)])
    with pytest.raises(ValueError, match="only the method 'two_sided' takes gradients"):
        lr.factorize(params, other, key=KEY, gradients=gradients)
    for options, message in (
        ({"objective": "divergence", "variables": variables}, "needs gradients"),
        ({"gradients": gradients}, "gradients need the variables"),
        ({"gradients": {}, "variables": variables}, "conv/kernel: has no gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            lr.allocate(plan, params=0.9, **options)
    with pytest.raises(ValueError, match="which the rule of 'conv/kernel' and 3 more does not have"):
        lr.allocate(other, params=0.9, variables=variables, gradients=gradients)


def test_a_layer_that_this_call_does_not_use_is_named():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, both=True):
            y = nn.Dense(4, name="a")(x)
            return y + nn.Dense(4, name="b")(x) if both else y

    model, x = Two(), normal(4, 3, 5)
    variables, plan = model.init(KEY, x), planned(model, x)
    with pytest.raises(ValueError, match="cannot capture the gradients of 'b/kernel'"):
        lr.inputs.gradient_moments(model, variables, [x], plan, key=KEY, both=False)
