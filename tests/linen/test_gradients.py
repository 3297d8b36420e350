"""Gradients at the layers' outputs, against jacobians of the same network written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.inputs import CURVATURES
from tests.projection.reference import normal

KEY = jax.random.key(0)
RULES = [lr.Rule(".*kernel", rank=2, method="two_sided")]


class Net(nn.Module):
    """Every layer adds what `shifts` has for it to its outputs: a way to their gradients that is not ours."""

    @nn.compact
    def __call__(self, x, shifts=None):
        def shifted(name, y):
            return y if shifts is None else y + shifts[name]

        x = nn.relu(shifted("conv", nn.Conv(6, (3, 3), strides=2, name="conv")(x)))
        x = nn.relu(shifted("general", nn.DenseGeneral((2, 4), axis=(-1,), name="general")(x)))
        x = nn.tanh(shifted("dense", nn.Dense(5, name="dense")(x.mean((1, 2)).reshape(-1, 8))))
        return shifted("head", nn.Dense(4, use_bias=False, name="head")(x))


IMAGES = normal(0, 7, 6, 6, 3)


def per_label(label):
    """Of one label, in proportion to its probability: summed over labels, the gradients are the Fisher information exactly."""

    def cotangents(outputs, key):
        p = jax.nn.softmax(outputs)
        chosen = p[..., label : label + 1]
        return jnp.sqrt(chosen) * (p - jax.nn.one_hot(label, outputs.shape[-1]))

    return cotangents


def exact(model, variables, batches, plan, classes, **kwargs):
    found = [
        lr.inputs.gradient_moments(model, variables, batches, plan, key=KEY, loss=per_label(c), **kwargs)
        for c in range(classes)
    ]
    return jax.tree.map(lambda *parts: sum(parts), *found)


def planned(model, *args, rules=RULES):
    return lr.plan(model, *args, rules)


def by_jacobians(model, variables, images, shapes):
    """E Σ_positions ggᵀ with g = Jᵀ(p - label) over all labels, example by example."""
    found = {}
    for image in images:
        shifts = {name: jnp.zeros((1, *shape)) for name, shape in shapes.items()}
        p = np.asarray(jax.nn.softmax(model.apply(variables, image[None]))[0], np.float64)
        jacobians = jax.jacrev(lambda shifts, image=image: model.apply(variables, image[None], shifts)[0])(shifts)
        fisher = np.diag(p) - np.outer(p, p)
        for name, shape in shapes.items():
            j = np.asarray(jacobians[name], np.float64).reshape(
                len(p), -1, np.prod(shape[-2:] if name == "general" else shape[-1:])
            )
            found[name] = found.get(name, 0) + np.einsum("kpi,kl,lpj->ij", j, fisher, j) / len(images)
    return found


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_they_are_the_fisher_information_at_every_layer(scheme):
    model = Net()
    variables = jax.tree.map(lambda a: 2 * a, model.init(KEY, IMAGES))
    plan = planned(model, IMAGES, rules=[lr.Rule(".*kernel", rank=2, scheme=scheme, method="two_sided")])
    found = exact(model, variables, [IMAGES[:4], IMAGES[4:]], plan, 4)
    shapes = {"conv": (3, 3, 6), "general": (3, 3, 2, 4), "dense": (5,), "head": (4,)}
    expected = by_jacobians(model, variables, IMAGES, shapes)
    assert found.keys() == {f"{name}/kernel" for name in shapes}
    for name, moment in expected.items():
        np.testing.assert_allclose(found[f"{name}/kernel"], moment, atol=1e-5 * np.abs(moment).max())


def test_drawn_ones_are_near_and_unbiased_and_the_key_decides():
    model = Net()
    variables, plan = model.init(KEY, IMAGES), planned(model, IMAGES)
    expected = exact(model, variables, [IMAGES], plan, 4)
    drawn = lr.inputs.gradient_moments(model, variables, [IMAGES], plan, key=KEY, draws=300)
    again = lr.inputs.gradient_moments(model, variables, [IMAGES], plan, key=KEY, draws=300)
    for name, moment in expected.items():
        error = np.linalg.norm(drawn[name] - moment) / np.linalg.norm(moment)
        assert error < 0.1, name  # 2,100 predictions; a wrong curvature is off by its own size
        np.testing.assert_array_equal(drawn[name], again[name])


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


def unrolled(params, x, shifts, stacked):
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i] if stacked else a, params["blocks"]["dense"])
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"] + shifts[i])
    return x @ params["head"]["kernel"]


@pytest.mark.parametrize("stacked", [True, False])
def test_members_of_a_stack_have_their_own_and_turns_of_a_loop_add_up(stacked):
    model, x = Scanned(stacked), normal(1, 5, 6)
    variables = model.init(KEY, x)
    found = exact(model, variables, [x], planned(model, x), 3)["blocks/dense/kernel"]
    expected = np.zeros((3, 6, 6))
    for row in x:
        run = lambda shifts, row=row: unrolled(variables["params"], row, shifts, stacked)  # noqa: E731
        p = np.asarray(jax.nn.softmax(run(jnp.zeros((3, 6)))))
        j = np.asarray(jax.jacrev(run)(jnp.zeros((3, 6))))
        expected += np.einsum("kti,kl,ltj->tij", j, np.diag(p) - np.outer(p, p), j) / len(x)
    np.testing.assert_allclose(found, expected if stacked else expected.sum(0), atol=1e-6)


def test_a_kernel_that_two_calls_share_has_the_sum_of_both():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, shifts=(0.0, 0.0)):
            dense = nn.Dense(6, name="dense")
            return dense(jnp.tanh(dense(x) + shifts[0])) + shifts[1]

    model, x = Shared(), normal(2, 3, 6)
    variables = model.init(KEY, x)
    found = exact(model, variables, [x], planned(model, x), 6)["dense/kernel"]
    expected = np.zeros((6, 6))
    for row in x:
        p = np.asarray(jax.nn.softmax(model.apply(variables, row)))
        for j in jax.jacrev(lambda shifts, row=row: model.apply(variables, row, shifts))((jnp.zeros(6), jnp.zeros(6))):
            expected += np.asarray(j).T @ (np.diag(p) - np.outer(p, p)) @ np.asarray(j) / len(x)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_second_order_says_what_the_network_loses():
    """Where little is lost; what the measured divergence of the predictions is, in float64."""
    model, x = Net(), normal(3, 200, 6, 6, 3)
    variables = jax.tree.map(lambda a: 2 * a, model.init(KEY, x))
    plan = lr.plan(model, x[:1], [lr.Rule(".*kernel", scale=1.0, method="two_sided")])
    moments = lr.inputs.second_moments(model, variables, [x], plan.opened())
    gradients = lr.inputs.gradient_moments(model, variables, [x], plan.opened(), key=KEY, draws=20)
    data = {"moments": moments, "gradients": gradients}
    made = lr.allocate(plan, params=0.9, variables=variables, **data)
    params = lr.factorize(variables["params"], made, key=KEY, **data)
    dense, low = (np.asarray(lr.apply(model, {"params": p}, x), np.float64) for p in (variables["params"], params))
    logs = [y - np.log(np.exp(y).sum(-1, keepdims=True)) for y in (dense, low)]
    measured = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    predicted = sum(kernel.divergence for kernel in made.kernels)
    assert predicted == pytest.approx(measured, rel=0.3)
    table = made.rows()
    assert table[0][-4:-1] == ["risk", "divergence", "next 1%"] and float(table[-1][-3]) == pytest.approx(predicted, abs=1e-5)
    alike = lr.allocate(
        lr.plan(model, x[:1], [lr.Rule(".*kernel", scale=1.0)]), params=0.9, variables=variables, moments=moments
    )
    assert all(kernel.divergence is None for kernel in alike.kernels)
    spectral = lr.allocate(plan, params=0.9, objective="uniform", variables=variables, **data)
    assert predicted <= sum(kernel.divergence for kernel in spectral.kernels)


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
    moments, gradients = lr.inputs.second_moments(model, variables, [IMAGES], plan), measure()
    params = variables["params"]
    for data, message in (
        ({}, "needs moments and gradients"),
        ({"moments": moments}, "needs moments and gradients"),
        (
            {"moments": moments, "gradients": {**gradients, "head/kernel": jnp.eye(3)}},
            r"head/kernel: gradients must have shape \[4, 4\]",
        ),
        ({"moments": moments, "gradients": {**gradients, "hat/kernel": jnp.eye(3)}}, "hat/kernel: has data"),
        ({"moments": moments, "gradients": {**gradients, "head/kernel": -jnp.eye(4)}}, "positive semidefinite"),
    ):
        with pytest.raises(ValueError, match=message):
            lr.factorize(params, plan, key=KEY, **data)
    other = lr.plan(model, IMAGES, [lr.Rule(".*kernel", rank=2)])
    with pytest.raises(ValueError, match="only the method 'two_sided' takes gradients"):
        lr.factorize(params, other, key=KEY, moments=moments, gradients=gradients)
    for options, message in (
        ({"objective": "divergence"}, "needs gradients"),
        ({"gradients": gradients}, "gradients need the moments"),
        ({"gradients": gradients, "moments": moments, "sensitivity": {"head/kernel": 1.0}}, "not both"),
        ({"gradients": {}, "moments": moments}, "conv/kernel: has no gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            lr.allocate(plan, params=0.9, variables=variables, **options)
    with pytest.raises(ValueError, match="which the rule of 'conv/kernel' and 3 more does not have"):
        lr.allocate(other, params=0.9, variables=variables, gradients=gradients, moments=moments)


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
