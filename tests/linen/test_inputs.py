"""What layers are fed, against the layers' own outputs; and projections made for it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.experiment.data import datasets
from lowrank_jax.paths import named_leaves
from lowrank_jax.projection import linalg

KEY = jax.random.key(0)


class Net(nn.Module):
    """Convolutions of every kind behind BatchNorm, a shared layer, attention's kernels of three axes."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="plain")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Conv(12, (3, 5), strides=2, padding="CIRCULAR", name="strided")(x))
        x = nn.relu(nn.Conv(12, (3, 3), kernel_dilation=(1, 2), padding="VALID", name="dilated")(x[:, :, :]))
        x = x.reshape(x.shape[0], -1, 12)
        shared = nn.Dense(12, name="shared")
        x = nn.relu(shared(nn.relu(shared(x))))
        x = nn.remat(nn.MultiHeadDotProductAttention)(2, name="attention")(x)
        return nn.Dense(10, name="head")(x.mean(1))


@pytest.fixture(scope="module")
def net():
    model, x = Net(), jax.random.uniform(KEY, (4, 10, 14, 3))
    return model, x, model.init(jax.random.key(1), x)


def make_plan(net, scheme="channel", method="kernel_projection"):
    model, x, _ = net
    return lr.plan(model, x, [lr.Rule("head/kernel"), lr.Rule(".*", rank=2, scheme=scheme, method=method)])


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_inputs_times_the_matrix_are_the_layers_outputs(net, scheme):
    """Without sampling (every position is wanted) the moments of outputs must agree, whatever the order of positions."""
    model, x, variables = net
    plan = make_plan(net, scheme)
    samples = lr.inputs.samples(model, variables, [x], plan, key=KEY, per_batch=10**6, train=True)
    _, state = model.apply(variables, x, train=True, capture_intermediates=True, mutable=["batch_stats", "intermediates"])
    params = named_leaves(variables["params"])
    for kernel in plan.factored:
        view, outputs = kernel.view, state["intermediates"]
        for part in kernel.name.split("/")[:-1]:
            outputs = outputs[part]
        wanted = jnp.concatenate([y.reshape(-1, view.m // view.group) for y in outputs["__call__"]])
        wanted = wanted - params[kernel.name.replace("kernel", "bias")].reshape(-1)
        matrix = view.to_matrix(params[kernel.name]).reshape(view.n, view.group, -1)
        got = jnp.einsum("sgn,ngo->so", samples[kernel.name], matrix)
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got.mean(0), wanted.mean(0), atol=1e-4)
        np.testing.assert_allclose(got.T @ got, wanted.T @ wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_moments_are_those_of_the_samples_however_the_batches_fall(net, scheme):
    model, x, variables = net
    plan = make_plan(net, scheme)
    samples = lr.inputs.samples(model, variables, [x], plan, key=KEY, per_batch=10**6)
    moments = lr.inputs.second_moments(model, variables, [x[:1], x[1:3], x[3:]], plan)
    for name, rows in samples.items():
        rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
        np.testing.assert_allclose(moments[name], rows.T @ rows / len(rows), atol=1e-5)
        assert moments[name].dtype == jnp.float32


def test_factored_kernels_can_be_watched_too(net):
    model, x, variables = net
    plan = make_plan(net)
    params = lr.factorize(variables["params"], plan, key=KEY)
    before = lr.inputs.second_moments(model, variables, [x], plan)
    after = lr.inputs.second_moments(model, {**variables, "params": params}, [x], plan)
    np.testing.assert_allclose(before["plain/kernel"], after["plain/kernel"])
    assert not np.allclose(before["strided/kernel"], after["strided/kernel"])


class Scanned(nn.Module):
    seen: bool

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "lowrank_inputs": 0} if self.seen else {"params": 0}
        block = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return block(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(6, name="dense")(x)), None


def test_layers_under_scan_have_moments_of_their_own_once_the_collection_is_scanned():
    x = jax.random.normal(KEY, (9, 6))
    for seen in (True, False):
        model = Scanned(seen)
        variables = {"params": model.init(KEY, x)["params"]}
        plan = lr.plan(model, x, [lr.Rule(".*", rank=1)])
        if not seen:
            with pytest.raises(ValueError, match=r'cannot capture the inputs of .layers/dense/kernel.: .*"lowrank_inputs": 0'):
                lr.inputs.second_moments(model, variables, [x], plan)
            continue
        moments = lr.inputs.second_moments(model, variables, [x], plan)
        dense = variables["params"]["layers"]["dense"]
        for layer in range(3):
            np.testing.assert_allclose(moments["layers/dense/kernel"][layer], x.T @ x / 9, atol=1e-5)
            x = Layer().apply({"params": {"dense": jax.tree.map(lambda leaf, layer=layer: leaf[layer], dense)}}, x, None)[0]


def digits_images(split):
    arrays = datasets.load(datasets.describe("digits", {}), split, None)
    return jnp.asarray(arrays.images, jnp.float32) / 255


class Plain(nn.Module):
    """The layers whose inputs are real images, and hidden units after BatchNorm and ReLU."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(32, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.relu(nn.Dense(64, name="dense")(x.reshape(x.shape[0], -1)))


@pytest.mark.parametrize("name", ["conv/kernel", "dense/kernel"])
def test_on_real_images_the_data_aware_projection_loses_less(name):
    model, seen, unseen = Plain(), digits_images("train")[:512], digits_images("test")
    variables = model.init(KEY, seen)
    plan = lr.plan(model, seen, [lr.Rule(name, rank=3)])
    moments = lr.inputs.second_moments(model, variables, [seen[:256], seen[256:]], plan, train=True)

    def features(params):
        apply = lr.apply(model, {**variables, "params": params}, unseen, train=True, mutable=["batch_stats"])
        return apply[0]

    dense = features(variables["params"])
    plain, aware = (
        jnp.sum((features(lr.factorize(variables["params"], plan, key=KEY, moments=m)) - dense) ** 2) for m in (None, moments)
    )
    assert aware < 0.9 * plain


def test_isotropic_inputs_change_nothing(net):
    _, _, variables = net
    plan = make_plan(net)
    moments = {kernel.name: 2.5 * jnp.eye(kernel.view.n) for kernel in plan.factored}
    with_moments = lr.merge(lr.factorize(variables["params"], plan, key=KEY, moments=moments))
    without = lr.merge(lr.factorize(variables["params"], plan, key=KEY))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), with_moments, without)


def test_the_data_aware_projection_is_the_projection_of_a_whitened_kernel():
    n, m, rank = 7, 9, 2
    rng = np.random.default_rng(0)
    w, mix = rng.standard_normal((n, m)), rng.standard_normal((n, n)) * np.array([1, 1, 1, 1, 0.1, 0.1, 0])
    model = nn.Dense(m, use_bias=False)
    plan = lr.plan(model, jnp.ones((1, n)), [lr.Rule("kernel", rank=rank)])
    moment = mix @ mix.T  # of rank six: one direction has no input
    regular = moment + linalg.RIDGE * np.trace(moment) / n * np.eye(n)
    params = lr.factorize(
        {"kernel": jnp.asarray(w, jnp.float32)}, plan, key=KEY, moments={"kernel": jnp.asarray(moment, jnp.float32)}
    )
    kernel = params["kernel"]
    np.testing.assert_allclose(kernel.u.T @ kernel.u, kernel.v @ kernel.v.T, atol=1e-4)
    values, vectors = np.linalg.eigh(regular)
    root = (vectors * np.sqrt(values)) @ vectors.T  # any square root will do
    u, v = lr.projection.kernel_projection(jnp.asarray(root @ w, jnp.float32), rank)
    np.testing.assert_allclose(root @ kernel.merge(), u @ v, atol=1e-4)


def test_a_layer_that_is_fed_zeros_gets_the_plain_projection():
    model = nn.Dense(9, use_bias=False)
    params = model.init(KEY, jnp.ones((1, 7)))["params"]
    plan = lr.plan(model, jnp.ones((1, 7)), [lr.Rule("kernel", rank=2)])
    aware = lr.factorize(params, plan, key=KEY, moments={"kernel": jnp.zeros((7, 7))})
    plain = lr.factorize(params, plan, key=KEY)
    np.testing.assert_allclose(aware["kernel"].merge(), plain["kernel"].merge(), atol=1e-5)


def test_data_that_does_not_fit_gets_one_clear_error(net):
    model, x, variables = net
    plan = make_plan(net)
    moments = lr.inputs.second_moments(model, variables, [x], plan)

    def factorize(plan=plan, **data):
        return lr.factorize(variables["params"], plan, key=KEY, **data)

    with pytest.raises(TypeError, match=r"captured from a flax\.linen\.Module, not from function"):
        lr.inputs.second_moments(lambda x: x, variables, [x], plan)
    with pytest.raises(ValueError, match="no batches"):
        lr.inputs.second_moments(model, variables, [], plan)
    with pytest.raises(ValueError, match="plain/kernel: has no moments"):
        factorize(moments={name: m for name, m in moments.items() if name != "plain/kernel"})
    with pytest.raises(ValueError, match=r"plain/kernel: moments must be \[27, 27\], are \[26, 26\]"):
        factorize(moments={**moments, "plain/kernel": jnp.eye(26)})
    with pytest.raises(ValueError, match="typo/kernel: is given data, and is no kernel that the plan factors"):
        factorize(moments={**moments, "typo/kernel": jnp.eye(2)})
    for moment in (jnp.full((27, 27), jnp.nan), -jnp.eye(27)):
        with pytest.raises(ValueError, match="plain/kernel: moments are not those of any finite inputs"):
            factorize(moments={**moments, "plain/kernel": moment})
    with pytest.raises(ValueError, match="inputs are for the method 'function_approximation'"):
        factorize(inputs={})
    with pytest.raises(ValueError, match="moments or inputs, not both"):
        factorize(moments=moments, inputs={})
    with pytest.raises(ValueError, match="plain/kernel: has no inputs"):
        factorize(make_plan(net, method="function_approximation"), inputs={})


def test_samples_serve_the_sampled_method(net):
    model, x, variables = net
    plan = make_plan(net, "spatial", "function_approximation")
    samples = lr.inputs.samples(model, variables, [x, 2 * x], plan, key=KEY, per_batch=64)
    assert samples["plain/kernel"].shape == (128, 3, 9)
    params = lr.factorize(variables["params"], plan, key=KEY, inputs=samples)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
