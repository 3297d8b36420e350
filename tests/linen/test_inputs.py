"""What layers read, against the layers' own outputs; and projections made for it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import lowrank_jax as lr
from lowrank_jax.linen.inputs import capture
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import Plan
from lowrank_jax.projection import linalg
from tests import drawn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


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


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_inputs_times_the_matrix_are_the_layers_outputs(scheme):
    model, x = Net(), RNG.uniform(size=(4, 10, 14, 3)).astype(np.float32)
    variables = drawn.variables(model, x)
    plan = lr.plan(model, x, [lr.Rule("head/kernel"), lr.Rule(".*", rank=2, scheme=scheme)])

    @jax.jit
    def run(variables, x):
        every = capture(model, variables, x, plan, lambda _, x: (x,), lambda a, b: (a[0], b[0]), None, {"train": True})
        _, state = model.apply(variables, x, train=True, capture_intermediates=True, mutable=["batch_stats", "intermediates"])
        return every, state["intermediates"]

    captured, layers = run(variables, x)
    params = named_leaves(variables["params"])
    for kernel in plan.factored:
        view, outputs = kernel.view, layers
        for part in kernel.name.split("/")[:-1]:
            outputs = outputs[part]
        matrix = np.asarray(view.to_matrix(params[kernel.name])).reshape(view.n, view.group, -1)
        bias = params[kernel.name.replace("kernel", "bias")].reshape(-1)
        assert len(captured[kernel.name]) == len(outputs["__call__"])  # a use each
        for read, wanted in zip(captured[kernel.name], outputs["__call__"], strict=True):
            got = np.einsum("sgn,ngo->so", read, matrix) + bias
            np.testing.assert_allclose(got, wanted.reshape(got.shape), rtol=1e-3, atol=1e-4)


class Small(nn.Module):
    """A convolution, and a dense layer that is used twice."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), padding="VALID", name="conv")(x))
        shared = nn.Dense(6, name="shared")
        return shared(nn.relu(shared(x)))


IMAGES = RNG.standard_normal((4, 4, 5, 3)).astype(np.float32)
VARIABLES = drawn.variables(Small(), IMAGES)
PARAMS = VARIABLES["params"]


def small_plan(scheme="channel", method="kernel_projection"):
    return lr.plan(Small(), IMAGES, [lr.Rule(".*", rank=2, scheme=scheme, method=method)])


def reads(variables):
    """What the three layers are given, written out: `[batch, rows, columns, 3, 3, 3]` and twice `[batch, ..., 6]`."""
    patches = np.lib.stride_tricks.sliding_window_view(IMAGES, (3, 3), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    dense = jax.tree.map(np.asarray, lr.merge(variables["params"]))
    first = np.maximum(np.einsum("bxyijc,ijco->bxyo", patches, dense["conv"]["kernel"]) + dense["conv"]["bias"], 0)
    second = np.maximum(first @ dense["shared"]["kernel"] + dense["shared"]["bias"], 0)
    return patches, first, second


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_moments_are_those_of_what_is_read_however_the_batches_fall(scheme):
    batches = [IMAGES[:1], IMAGES[1:]]
    moments = lr.inputs.second_moments(Small(), VARIABLES, batches, small_plan(scheme))
    assert moments.keys() == lr.inputs.moment_shapes(small_plan(scheme)).keys()
    patches, first, second = reads(VARIABLES)
    rows = patches if scheme == "channel" else patches.swapaxes(3, 4)  # an output of 1 x 3 reads three columns of 3 x 1
    rows = {
        "conv/kernel": rows.reshape(-1, 27 if scheme == "channel" else 9),
        "shared/kernel": np.stack([first, second]).reshape(-1, 6),
    }
    for name, expected in lr.inputs.moment_shapes(small_plan(scheme)).items():
        assert (moments[name].shape, moments[name].dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(moments[name], rows[name].T @ rows[name] / len(rows[name]), atol=1e-5)


def test_factored_kernels_can_be_watched_too():
    view = small_plan().factored[0].view
    pair = view.from_factors(*(jnp.asarray(RNG.standard_normal(size), jnp.float32) for size in ((27, 2), (2, 6))))
    factored = {"params": {**PARAMS, "conv": {**PARAMS["conv"], "kernel": pair}}}
    moments = lr.inputs.second_moments(Small(), factored, [IMAGES], small_plan())
    patches, first, second = reads(factored)
    for name, read in {"conv/kernel": patches.reshape(-1, 27), "shared/kernel": np.stack([first, second])}.items():
        read = read.reshape(-1, read.shape[-1])
        np.testing.assert_allclose(moments[name], read.T @ read / len(read), rtol=1e-4, atol=1e-3)


def test_samples_are_of_different_positions_of_each_batch_and_serve_the_sampled_method():
    plan = small_plan("spatial", "function_approximation")
    samples = lr.inputs.samples(Small(), VARIABLES, [IMAGES, 2 * IMAGES], plan, key=KEY, per_batch=7)
    assert samples["conv/kernel"].shape == (14, 3, 9)
    assert samples["shared/kernel"].shape == (28, 1, 6)  # of both uses
    patches, *_ = reads(VARIABLES)
    positions = patches.swapaxes(3, 4).reshape(-1, 27)
    for scale, rows in ((1, samples["conv/kernel"][:7]), (2, samples["conv/kernel"][7:])):
        differences = np.abs(np.asarray(rows).reshape(7, 1, 27) - scale * positions).max(-1)
        assert len(set(differences.argmin(1))) == 7 and differences.min(1).max() < 1e-5
    conv = lr.plan(Small(), IMAGES, [lr.Rule("conv/kernel", rank=2, scheme="spatial", method="function_approximation")])
    factored = lr.factorize(PARAMS, conv, key=KEY, inputs={"conv/kernel": samples["conv/kernel"]})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(factored))
    with pytest.raises(ValueError, match="per_batch 0 must be at least 1"):
        lr.inputs.samples(Small(), VARIABLES, [IMAGES], plan, key=KEY, per_batch=0)


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


def scanned(seen):
    x = RNG.standard_normal((9, 6)).astype(np.float32)
    model = Scanned(seen)
    return model, x, drawn.variables(model, x), lr.plan(model, x, [lr.Rule(".*", rank=1, method="spectral")])


def test_layers_under_scan_have_moments_of_their_own_once_the_collection_is_scanned():
    model, x, variables, plan = scanned(True)
    moments = lr.inputs.second_moments(model, variables, [x], plan)
    dense = variables["params"]["layers"]["dense"]
    for layer in range(3):
        np.testing.assert_allclose(moments["layers/dense/kernel"][layer], x.T @ x / 9, atol=1e-5)
        x = np.maximum(x @ dense["kernel"][layer] + dense["bias"][layer], 0)
    model, x, variables, plan = scanned(False)
    with pytest.raises(ValueError, match=r'cannot capture the inputs of .layers/dense/kernel.: .*"lowrank_inputs": 0'):
        lr.inputs.second_moments(model, variables, [x], plan)


class Tied(nn.Module):
    """One layer, in a loop whose turns can be seen or after a call outside of one whose turns cannot."""

    seen: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, name="dense")
        x = x if self.seen else nn.tanh(layer(x))
        turns = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_axes={"lowrank_inputs": 0} if self.seen else {},
            variable_broadcast="params",
            split_rngs={"params": False},
            length=3,
        )
        return turns(layer, x, None)[0]


def test_moments_of_one_layer_are_those_of_all_its_uses_or_refused():
    x = RNG.standard_normal((9, 6)).astype(np.float32)
    variables = drawn.variables(Tied(True), x)
    kernel, bias = (np.asarray(variables["params"]["dense"][name], np.float64) for name in ("kernel", "bias"))
    inputs = [x]
    for _ in range(2):
        inputs.append(np.tanh(inputs[-1] @ kernel + bias))
    rows = np.concatenate(inputs)
    plan = lr.plan(Tied(True), x, [lr.Rule(".*", rank=1)])
    moments = lr.inputs.second_moments(Tied(True), variables, [x], plan)
    np.testing.assert_allclose(moments["dense/kernel"], rows.T @ rows / len(rows), atol=1e-5)
    lr.factorize(variables["params"], plan, key=KEY, moments=moments)
    with pytest.raises(ValueError, match=r"cannot capture the inputs of .dense/kernel."):
        lr.inputs.second_moments(Tied(False), variables, [x], plan)


class Plain(nn.Module):
    """The layers whose inputs are real images, and hidden units after BatchNorm and ReLU."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(32, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.relu(nn.Dense(64, name="dense")(x.reshape(x.shape[0], -1)))


@pytest.mark.slow
def test_on_real_images_the_data_aware_projection_loses_less():
    images = load_digits().images[..., None].astype(np.float32) / 16
    model, seen, unseen = Plain(), images[:512], images[-360:]
    variables = drawn.variables(model, seen)
    dense = variables["params"]
    plan = lr.plan(model, seen, [lr.Rule(".*", rank=3)])
    moments = lr.inputs.second_moments(model, variables, [seen[:256], seen[256:]], plan, train=True)
    plain, aware = (jax.jit(lr.merge)(lr.factorize(dense, plan, key=KEY, moments=m)) for m in (None, moments))

    @jax.jit
    def features(params):
        return model.apply({**variables, "params": params}, unseen, train=True, mutable=["batch_stats"])[0]

    wanted = features(dense)
    for layer in ("conv", "dense"):
        errors = [np.sum((features({**dense, layer: part[layer]}) - wanted) ** 2) for part in (aware, plain)]
        assert errors[0] < 0.9 * errors[1]


def with_and_without(params, plan, moments):
    """The kernels' products, `[*stack, ...]`, for these moments of the inputs and for isotropic inputs."""
    factored = [lr.factorize(params, plan, key=KEY, moments=m) for m in (moments, None)]
    return [named_leaves(jax.jit(lr.merge)(params)) for params in factored]


def test_isotropic_inputs_change_nothing():
    conv = lr.plan(Small(), IMAGES, [lr.Rule("conv/kernel", rank=2, scheme="spatial")])
    _, _, variables, stack = scanned(True)
    for params, plan in ((PARAMS, conv), (variables["params"], stack)):
        shapes = lr.inputs.moment_shapes(plan)
        isotropic = {name: np.broadcast_to(2.5 * np.eye(s.shape[-1], dtype=s.dtype), s.shape) for name, s in shapes.items()}
        with_moments, without = with_and_without(params, plan, isotropic)
        for name, kernel in without.items():
            np.testing.assert_allclose(with_moments[name], kernel, atol=2e-5, err_msg=name)


DENSE = nn.Dense(9, use_bias=False)
DENSE_PLAN = lr.plan(DENSE, np.ones((1, 7)), [lr.Rule("kernel", rank=2)])


def test_the_data_aware_projection_is_the_projection_of_a_whitened_kernel():
    n, m = 7, 9
    rng = np.random.default_rng(0)
    w, mix = rng.standard_normal((n, m)), rng.standard_normal((n, n)) * np.array([1, 1, 1, 1, 0.1, 0.1, 0])
    moment = mix @ mix.T  # of rank six: one direction has no input
    regular = moment + linalg.RIDGE * np.diag(np.diag(moment))
    params = lr.factorize(
        {"kernel": np.asarray(w, np.float32)}, DENSE_PLAN, key=KEY, moments={"kernel": np.asarray(moment, np.float32)}
    )
    u, v = (np.asarray(factor) for factor in (params["kernel"].u, params["kernel"].v))
    np.testing.assert_allclose(u.T @ u, v @ v.T, atol=1e-4)
    values, vectors = np.linalg.eigh(regular)
    root = (vectors * np.sqrt(values)) @ vectors.T  # any square root will do
    plain = lr.factorize({"kernel": np.asarray(root @ w, np.float32)}, DENSE_PLAN, key=KEY)["kernel"]
    np.testing.assert_allclose(root @ (u @ v), np.asarray(plain.u) @ np.asarray(plain.v), atol=1e-4)


def outlier(size):
    """By kind of moment `[n, n]` in float64: what scales the inputs' channels, and how many samples there are."""
    scales = np.exp(np.random.default_rng(0).standard_normal(N))
    scales[5] *= size
    return scales


N, M, RANK = 32, 40, 6
MOMENTS = {
    "plain": (outlier(1), 4000),
    "outlier x 100": (outlier(100), 4000),
    "outlier x 1000": (outlier(1000), 4000),
    "dead channels": (outlier(1) * (np.arange(N) % 3 > 0), 4000),
    "dead channels and an outlier": (outlier(1000) * (np.arange(N) % 3 > 0), 4000),
    "few samples": (outlier(1), 16),
    "few samples and an outlier": (outlier(1000), 16),
}
WIDE = nn.Dense(M, use_bias=False)
WIDE_PLAN = lr.plan(WIDE, np.ones((1, N)), [lr.Rule("kernel", rank=RANK, method="spectral")])


@pytest.mark.parametrize("kind", MOMENTS)
def test_data_aware_factors_lose_a_few_per_cent_more_than_the_best_ones(kind):
    scales, samples = MOMENTS[kind]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((samples, N)) @ (np.eye(N) + 0.3 * rng.standard_normal((N, N))) * scales
    moment = (x.T @ x / samples).astype(np.float32)
    w = rng.standard_normal((N, M)).astype(np.float32)
    kernel = lr.factorize({"kernel": w}, WIDE_PLAN, key=KEY, moments={"kernel": moment})["kernel"]
    u, v = (np.asarray(factor, np.float64) for factor in (kernel.u, kernel.v))
    gap = w - u @ v
    # The least loss is the sum of the squares of what a truncated decomposition of S^½ W leaves (Eckart and Young).
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    left = np.linalg.svd(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T @ w, compute_uv=False)[RANK:]
    assert np.trace(gap.T @ moment @ gap) < 1.03 * np.sum(left**2)
    assert np.linalg.norm(u @ v) < 3 * np.linalg.norm(w)  # no input says anything of dead channels: nothing large is made up


def test_a_layer_that_reads_zeros_gets_the_plain_projection():
    params = {"kernel": RNG.standard_normal((7, 9)).astype(np.float32)}
    aware, plain = with_and_without(params, DENSE_PLAN, {"kernel": np.zeros((7, 7), np.float32)})
    np.testing.assert_allclose(aware["kernel"], plain["kernel"], atol=1e-5)


def test_data_that_does_not_fit_gets_one_clear_error():
    plan = small_plan()
    moments = {name: np.eye(shape.shape[-1], dtype=np.float32) for name, shape in lr.inputs.moment_shapes(plan).items()}

    def factorize(plan: Plan = plan, **data):
        return lr.factorize(PARAMS, plan, key=KEY, **data)

    with pytest.raises(TypeError, match=r"takes a flax\.linen module; not function"):
        lr.inputs.second_moments(lambda x: x, VARIABLES, [IMAGES], plan)
    with pytest.raises(ValueError, match="no batches"):
        lr.inputs.second_moments(Small(), VARIABLES, [], plan)
    with pytest.raises(ValueError, match="conv/kernel: has no moments"):
        factorize(moments={name: m for name, m in moments.items() if name != "conv/kernel"})
    with pytest.raises(ValueError, match=r"conv/kernel: moments must have shape \[27, 27\], not \[26, 26\]"):
        factorize(moments={**moments, "conv/kernel": np.eye(26)})
    with pytest.raises(ValueError, match="typo/kernel: has data but is not a kernel that the plan could factor"):
        factorize(moments={**moments, "typo/kernel": np.eye(2)})
    nan = np.full((27, 27), np.nan, np.float32)
    for moment, problem in ((nan, "contain non-finite values"), (-moments["conv/kernel"], "must be positive semidefinite")):
        with pytest.raises(ValueError, match=f"conv/kernel: moments {problem}"):
            factorize(moments={**moments, "conv/kernel": moment})
    with pytest.raises(ValueError, match="only the method 'function_approximation' takes inputs"):
        factorize(inputs={})
    with pytest.raises(ValueError, match="moments or inputs, not both"):
        factorize(moments=moments, inputs={})
    with pytest.raises(ValueError, match="conv/kernel: has no inputs"):
        factorize(small_plan(method="function_approximation"), inputs={})


@pytest.mark.parametrize("capture", [lr.inputs.second_moments, functools.partial(lr.inputs.samples, key=KEY)])
@pytest.mark.parametrize(("batches", "index"), [([IMAGES[:0], IMAGES], 0), ([IMAGES, IMAGES[:0]], 1), ([IMAGES[:, :, :0]], 0)])
def test_an_empty_batch_gets_one_clear_error(capture, batches, index):
    with pytest.raises(ValueError, match=rf"batch {index} is empty, an array of shape \[.*\]: .* inputs of 'conv/kernel'"):
        capture(Small(), VARIABLES, batches, small_plan())


@pytest.mark.parametrize("value", [1e20, np.nan])
def test_moments_that_are_not_finite_name_their_kernels(value):
    x = np.ones((3, 7), np.float32)
    x[1, 2] = value
    variables = {"params": {"kernel": np.ones((7, 9), np.float32)}}
    with pytest.raises(ValueError, match=r"not finite in float32: .*, for kernel$"):
        lr.inputs.second_moments(DENSE, variables, [np.ones_like(x), x], DENSE_PLAN)


def test_moments_of_large_and_small_inputs_are_right_as_long_as_float32_holds_them():
    rows = RNG.standard_normal((3000, 7)).astype(np.float32)
    variables = {"params": {"kernel": np.ones((7, 9), np.float32)}}
    exact = rows.astype(np.float64).T @ rows / len(rows)
    for size in (2.0**59, 2.0**-50):  # the sum of squares is above float32's range
        batches = [np.float32(size) * rows[:2999], np.float32(size) * rows[2999:]]
        moment = lr.inputs.second_moments(DENSE, variables, batches, DENSE_PLAN)["kernel"]
        np.testing.assert_allclose(np.asarray(moment, np.float64) / size**2, exact, atol=1e-5)


def test_samples_of_a_small_batch_are_all_that_is_read():
    model, x = Plain(), RNG.standard_normal((3, 5, 5, 1)).astype(np.float32)
    variables = drawn.variables(model, x)
    plan = lr.plan(model, x, [lr.Rule(".*", rank=2)])
    rows = lr.inputs.samples(model, variables, [x], plan, key=KEY, per_batch=10**6, train=True)
    moments = lr.inputs.second_moments(model, variables, [x], plan, train=True)
    assert rows["conv/kernel"].shape == (3 * 9, 1, 9) and rows["dense/kernel"].shape[0] == 3
    for name, read in rows.items():
        read = np.asarray(read, np.float64).reshape(-1, read.shape[-1])
        np.testing.assert_allclose(moments[name], read.T @ read / len(read), atol=1e-5)
