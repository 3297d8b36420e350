"""Fidelity against NumPy in float64, where kernels are products of their factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

import lowrank_jax as lr
from tests import drawn

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 12)).astype(np.float32)


class Net(nn.Module):
    """With a BatchNorm, and a head that stays dense."""

    classes: int = 5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(16, name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Dense(14, name="second")(x))
        return nn.Dense(self.classes, name="head")(x)


RULES = [lr.Rule("head/kernel"), lr.Rule(".*kernel", rank=3)]
PLAN = lr.plan(Net(), X, RULES)


@pytest.fixture(scope="module")
def variables():
    return drawn.variables(Net(), X)


def compressed(variables, plan=PLAN):
    return {**variables, "params": lr.factorize(variables["params"], plan, key=jax.random.key(0))}


@pytest.fixture(scope="module")
def low(variables):
    return compressed(variables)


def doubled(variables):
    """In float64, factors multiplied out."""

    def wide(leaf):
        if isinstance(leaf, lr.LowRankKernel):
            u, v = (np.asarray(part, np.float64) for part in leaf.matrices())
            return np.asarray(leaf.view.from_matrix(jnp.asarray(u @ v)), np.float64) if leaf.rows != (0,) else u @ v
        return np.asarray(leaf, np.float64)

    return jax.tree.map(wide, variables, is_leaf=lambda leaf: isinstance(leaf, lr.LowRankKernel))


def norm_of(x, variables):
    params, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def by_hand(variables, x):
    """The outputs of both planned layers, and the logits, in float64."""
    wide, x = doubled(variables), np.asarray(x, np.float64)
    params = wide["params"]

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    first = dense("first", x)
    second = dense("second", np.maximum(norm_of(first, wide), 0))
    return {"first/kernel": first, "second/kernel": second}, dense("head", np.maximum(second, 0))


def relative(dense, other):
    return np.linalg.norm(other - dense) / np.linalg.norm(dense)


def assert_as_by_hand(found, dense, low, layers):
    """Compares with logits `[..., classes]` and the outputs of layers, of both networks."""
    one, other = dense.reshape(-1, dense.shape[-1]), low.reshape(-1, low.shape[-1])
    divergences = rel_entr(softmax(one, axis=1), softmax(other, axis=1)).sum(1).reshape(len(dense), -1).mean(1)
    agreements = (one.argmax(1) == other.argmax(1)).reshape(len(dense), -1).mean(1)
    np.testing.assert_allclose(found.divergences, divergences, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.agreements, agreements, rtol=1e-6)
    assert found.examples == len(dense)
    assert found.agreement == pytest.approx(agreements.mean()) and found.kl == pytest.approx(divergences.mean(), rel=1e-4)
    assert found.logits_error == pytest.approx(relative(one, other), rel=1e-4)
    assert found.layers == pytest.approx({name: relative(*both) for name, both in layers.items()}, rel=1e-4)


def test_it_is_what_numpy_finds_however_the_batches_fall(variables, low):
    said = []
    found = lr.fidelity(Net(), variables, low, [X[:30], X[30:]], PLAN, say=said.append)
    (dense, dense_logits), (other, other_logits) = by_hand(variables, X), by_hand(low, X)
    assert 0 < found.agreement < 1  # or it would tell nothing
    assert_as_by_hand(found, dense_logits, other_logits, {name: (dense[name], other[name]) for name in dense})
    assert list(found.layers) == ["first/kernel", "second/kernel"] and found.unseen == {}
    assert said == ["batch 1", "batch 2"]
    merged = {**low, "params": lr.merge(low["params"])}
    assert lr.fidelity(Net(), variables, merged, [X], PLAN).layers == pytest.approx(found.layers, rel=1e-4)
    whole = lr.fidelity(Net(), variables, low, iter([X]))
    assert whole.layers == {} and whole.kl == pytest.approx(found.kl, rel=1e-5)


def test_a_network_is_exactly_as_faithful_to_itself_as_can_be(variables, low):
    for given in (variables, low):
        found = lr.fidelity(Net(), given, jax.tree.map(jnp.copy, given), [X[:31], X], PLAN)
        assert (found.agreement, found.kl, found.logits_error) == (1, 0, 0)
        assert found.layers == {"first/kernel": 0, "second/kernel": 0}
        assert not found.divergences.any() and len(found.divergences) == found.examples == 71


class Images(nn.Module):
    """Convolutions of which one is used twice, and logits for every place."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(nn.Conv(6, (3, 3), name="conv")(x)))
        shared = nn.Conv(6, (1, 1), name="shared")
        return nn.Dense(4, name="head")(shared(nn.relu(shared(x))))


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_convolutions_shared_layers_and_maps_of_classes(scheme):
    images = RNG.standard_normal((5, 6, 7, 3)).astype(np.float32)
    variables = drawn.variables(Images(), images)
    plan = lr.plan(Images(), images, [lr.Rule("head/kernel"), lr.Rule(".*", rank=2, scheme=scheme)])
    other = compressed(variables, plan)

    def run(variables):
        wide = doubled({**variables, "params": lr.merge(variables["params"])})
        params = wide["params"]
        padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        conv = np.einsum("bxycij,ijco->bxyo", patches, params["conv"]["kernel"]) + params["conv"]["bias"]
        normal = np.maximum(norm_of(conv, wide), 0)
        once = normal @ params["shared"]["kernel"][0, 0] + params["shared"]["bias"]
        twice = np.maximum(once, 0) @ params["shared"]["kernel"][0, 0] + params["shared"]["bias"]
        layers = {"conv/kernel": conv, "shared/kernel": np.stack([once, twice])}
        return layers, twice @ params["head"]["kernel"] + params["head"]["bias"]

    found = lr.fidelity(Images(), variables, other, [images[:2], images[2:]], plan)
    (dense, dense_logits), (low, low_logits) = run(variables), run(other)
    assert_as_by_hand(found, dense_logits, low_logits, {name: (dense[name], low[name]) for name in dense})


class Stack(nn.Module):
    """The same block several times over."""

    seen: bool = True
    mapped: bool = False

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "lowrank_inputs": 0} if self.seen else {"params": 0}
        if self.mapped:
            block = nn.vmap(Layer, in_axes=(None, None), variable_axes=axes, split_rngs={"params": True}, axis_size=3)
            return block(name="layers")(x, None)[0].sum(0)
        block = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return block(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(12, name="dense")(x)), None


@pytest.mark.parametrize("mapped", [False, True])
def test_a_stack_is_one_kernel_whose_layers_count_together(mapped):
    model = Stack(mapped=mapped)
    variables = drawn.variables(model, X)
    plan = lr.plan(model, X, [lr.Rule(".*", rank=2)])
    other = compressed(variables, plan)

    def run(variables):
        dense, x, outputs = doubled({"params": lr.merge(variables["params"])})["params"]["layers"]["dense"], X, []
        for layer in range(3):
            outputs.append((X if mapped else x) @ dense["kernel"][layer] + dense["bias"][layer])
            x = np.maximum(outputs[-1], 0)
        return np.stack(outputs), np.maximum(outputs, 0).sum(0) if mapped else x

    (dense, dense_logits), (low, low_logits) = run(variables), run(other)
    found = lr.fidelity(model, variables, other, [X], plan)
    assert_as_by_hand(found, dense_logits, low_logits, {"layers/dense/kernel": (dense, low)})
    hidden = lr.fidelity(Stack(seen=False, mapped=mapped), variables, other, [X], plan)
    assert hidden.layers == {} and '"lowrank_inputs": 0' in hidden.unseen["layers/dense/kernel"]
    assert hidden.kl == pytest.approx(found.kl, rel=1e-5)


class Words(nn.Module):
    """An embedding, which no known layer has, and attention's kernels of three axes under remat."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        x = nn.remat(nn.MultiHeadDotProductAttention)(2, name="attention")(x)
        return nn.Dense(5, name="head")(x.mean(1))


def test_kernels_of_unknown_layers_are_left_out_by_name():
    tokens = RNG.integers(0, 11, (6, 4))
    variables = drawn.variables(Words(), tokens)
    plan = lr.plan(Words(), tokens, [lr.Rule("embed/.*", rows=(0,), rank=2), lr.Rule(".*kernel", rank=2)])
    found = lr.fidelity(Words(), variables, compressed(variables, plan), [tokens], plan)
    assert found.unseen == {"embed/embedding": "its layer is not known, or this call does not use it"}
    assert set(found.layers) == {kernel.name for kernel in plan.factored} - {"embed/embedding"} and len(found.layers) == 5
    _, state = Words().apply(variables, tokens, capture_intermediates=True, mutable=["intermediates"])
    _, other = Words().apply(
        {"params": lr.merge(compressed(variables, plan)["params"])},
        tokens,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    for name in ("query", "out"):
        one, two = (np.asarray(s["intermediates"]["attention"][name]["__call__"][0], np.float64) for s in (state, other))
        assert found.layers[f"attention/{name}/kernel"] == pytest.approx(relative(one, two), rel=1e-4)


class Merging(nn.Module):
    """A registered layer that returns a pair."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 8))
        return x @ kernel, len(x)


def test_a_layer_with_a_run_of_its_own_is_seen(register):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Merging(name="own")(x)[0]

    register(Merging, run=lambda layer, params, x: (x @ params["kernel"].u @ params["kernel"].v, len(x)))
    variables = drawn.variables(Own(), X)
    plan = lr.plan(Own(), X, [lr.Rule(".*", rank=2)])
    found = lr.fidelity(Own(), variables, compressed(variables, plan), [X], plan)
    assert found.layers == pytest.approx({"own/kernel": found.logits_error})


def test_other_outputs_other_arguments_and_states(variables, low):
    class Wrapped(Net):
        @nn.compact
        def __call__(self, x, train=False):
            return {"logits": super().__call__(x, train)}

    expected = lr.fidelity(Net(), variables, low, [X], PLAN)
    found = lr.fidelity(Wrapped(), variables, low, [(X,)], PLAN, logits=lambda returned: returned["logits"])
    assert found.kl == pytest.approx(expected.kl) and found.layers == pytest.approx(expected.layers)
    with pytest.raises(TypeError, match="Wrapped returns no array of logits: pass logits="):
        lr.fidelity(Wrapped(), variables, low, [X])
    trained = lr.fidelity(Net(), variables, low, [X], PLAN, train=True)
    assert trained.layers["first/kernel"] == pytest.approx(expected.layers["first/kernel"])
    assert trained.layers["second/kernel"] != pytest.approx(expected.layers["second/kernel"])  # by the batch's own statistics


def test_one_class_and_logits_without_a_batch(variables):
    model = Net(classes=1)
    given = drawn.variables(model, X)
    found = lr.fidelity(model, given, compressed(given, lr.plan(model, X, RULES)), [X])
    assert (found.agreement, found.kl) == (1, 0) and found.logits_error > 0
    single = lr.fidelity(Net(), variables, compressed(variables), [X[0]])
    assert (single.examples, single.agreements.shape) == (1, (1,))


class Given(nn.Module):
    """Logits that are its parameter, whatever it is called on."""

    @nn.compact
    def __call__(self, x):
        return self.param("logits", nn.initializers.zeros, (3, 4)) + 0 * x


def given(*rows):
    return {"params": {"logits": jnp.asarray(rows, jnp.float32)}}


def compared(dense, low):
    return lr.fidelity(Given(), given(*dense), given(*low), [np.zeros((3, 4), np.float32)])


def test_of_equal_logits_the_first_is_chosen():
    found = compared([[1, 1, 0, 0]] * 3, [[1, 1, 0, 0], [1, 0.5, 0, 0], [0.5, 1, 0, 0]])
    assert list(found.agreements) == [1, 1, 0]


def test_outputs_of_16_bits_are_compared_in_32():
    one, other = (jnp.asarray(RNG.standard_normal((3, 4)), jnp.bfloat16) for _ in range(2))
    found = lr.fidelity(Given(), {"params": {"logits": one}}, {"params": {"logits": other}}, [jnp.zeros((3, 4), jnp.bfloat16)])
    one, other = (np.asarray(logits, np.float64) for logits in (one, other))
    expected = rel_entr(softmax(one, axis=1), softmax(other, axis=1)).sum(1)
    np.testing.assert_allclose(found.divergences, expected, rtol=1e-5)
    assert found.logits_error == pytest.approx(relative(one, other), rel=1e-6)


def test_classes_that_are_masked_in_both_networks_count_nothing():
    low, out = [[1, 2, 3, -np.inf]] * 3, [[1, 2.5, 3, -np.inf]] * 3
    found = compared(low, out)
    assert found.logits_error == pytest.approx(0.5 / np.sqrt(14))
    expected = rel_entr(softmax([1, 2, 3]), softmax([1, 2.5, 3])).sum()
    assert found.kl == pytest.approx(expected, rel=1e-5)
    assert compared(low, [[1, 2, 3, 0]] * 3).logits_error == np.inf
    assert compared([[1, 2, 3, 0]] * 3, low).kl == np.inf


def test_where_the_dense_network_gives_zeros_an_error_is_none_or_infinite():
    zeros = [[0, 0, 0, 0]] * 3
    assert compared(zeros, zeros).logits_error == 0
    other = compared(zeros, [[0, 0, 0, 1e-30]] * 3)
    assert other.logits_error == np.inf and other.record()["logits_error"] is None


def test_squares_of_large_and_small_outputs_stay_numbers():
    for scale in (1e30, 1e-30):
        found = compared([[scale, 0, 0, 0]] * 3, [[2 * scale, 0, 0, 0]] * 3)
        assert found.logits_error == pytest.approx(1)


def test_a_table_has_the_totals_and_the_worst_layers_first(variables, low):
    found = lr.fidelity(Net(), variables, low, [X], PLAN)
    totals, header, *rows = (line.split() for line in str(found).splitlines() if line and not line.startswith("examples"))
    assert totals[:2] == ["40", f"{found.agreement:.4f}"] and header == ["layer", "of", "error"]
    assert [row[0] for row in rows] == sorted(found.layers, key=found.layers.get, reverse=True)
    assert list(found.worst(1)) == [max(found.layers, key=found.layers.get)]
    assert repr(found) == str(found) and "<table>" in found._repr_html_()
    assert found.record()["layers"] == found.layers


def test_what_is_no_number_or_nothing_is_refused(variables, low):
    with pytest.raises(ValueError, match="no batches"):
        lr.fidelity(Net(), variables, low, [])
    with pytest.raises(ValueError, match="batch 1 is empty"):
        lr.fidelity(Net(), variables, low, [X, X[:0]], PLAN)
    broken = jax.tree.map(lambda leaf: leaf, variables)
    broken["params"]["head"]["bias"] = broken["params"]["head"]["bias"] * jnp.nan
    with pytest.raises(ValueError, match="batch 0: the low-rank network's predictions are not numbers"):
        lr.fidelity(Net(), variables, broken, [X])
    with pytest.raises(ValueError, match="batch 0: the dense network's predictions are not numbers"):
        lr.fidelity(Net(), broken, variables, [X])
    with pytest.raises(TypeError, match="dense_variables must be a dict of collections"):
        lr.fidelity(Net(), None, low, [X])
    with pytest.raises(ValueError, match='variables must have "params"'):
        lr.fidelity(Net(), variables, {"batch_stats": {}}, [X])
    with pytest.raises(TypeError, match=r"plan must be a lowrank_jax\.Plan"):
        lr.fidelity(Net(), variables, low, [X], {})
    with pytest.raises(TypeError, match="batches must be a list"):
        lr.fidelity(Net(), variables, low, "batches")
    with pytest.raises(TypeError, match="say must be a function"):
        lr.fidelity(Net(), variables, low, [X], say=1)
    with pytest.raises(TypeError, match=r"takes a flax\.linen module"):
        lr.fidelity(Net, variables, low, [X])


def test_a_layer_whose_outputs_are_no_numbers_is_left_out_by_name(variables, low):
    class Ignored(Net):
        @nn.compact
        def __call__(self, x, train=False):
            nn.Dense(16, name="ignored")(jnp.where(x.sum() == 0, x, jnp.nan))
            return super().__call__(x, train)

    plan = lr.plan(Ignored(), X, RULES)
    dense = drawn.variables(Ignored(), X)
    found = lr.fidelity(Ignored(), dense, compressed(dense, plan), [X], plan)
    assert found.unseen == {"ignored/kernel": "its layer's outputs are not numbers"} and len(found.layers) == 2
    assert "not compared" in str(found)
