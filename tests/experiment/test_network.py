"""Models as their authors write them: what the check of a config accepts, trains and is evaluated."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowrank_jax import plan
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.network import Constructor, Network, train_argument
from lowrank_jax.experiment.training.build import build
from lowrank_jax.inputs import second_moments
from lowrank_jax.planning.rules import Rule
from tests import running


def flat(x):
    return x.reshape(len(x), -1)


class Trained(nn.Module):
    """With BatchNorm, of which a step in training is told from one in evaluation, as flax's own ResNet is written."""

    widths: Sequence[int]
    num_classes: int
    axis_name: Any = None

    @nn.compact
    def __call__(self, x, train: bool = True):
        for width in self.widths:
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


Small = functools.partial(Trained, widths=(8,))


class Needed(nn.Module):
    """`training` has no default."""

    num_outputs: int

    @nn.compact
    def __call__(self, x, *, training):
        return nn.Dense(self.num_outputs)(nn.Dropout(0.5)(flat(x), deterministic=not training))


class Positional(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, is_training):
        return nn.Dense(self.features)(nn.Dropout(0.5)(flat(x), deterministic=not is_training))


class Opposite(nn.Module):
    num_classes: int
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        return nn.Dense(self.num_classes)(nn.Dropout(0.5)(flat(x), deterministic=deterministic))


class Untold(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(16)(flat(x))))


class Renamed(nn.Module):
    """Its words are nobody else's."""

    words: int

    @nn.compact
    def __call__(self, x, *, learning):
        return nn.Dense(self.words)(nn.Dropout(0.5)(flat(x), deterministic=not learning))


class Passing(nn.Module):
    """Passes on whatever it is told."""

    num_classes: int

    @nn.compact
    def __call__(self, x, **kwargs):
        return Trained((4,), self.num_classes)(x, **kwargs)


class Remembering(nn.Module):
    """An LSTM over the rows, and the mean of its last state over all steps, in a collection of its own."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        rows = x.reshape(*x.shape[:2], -1)
        y = nn.RNN(nn.OptimizedLSTMCell(8))(rows)[:, -1]
        mean = self.variable("memory", "mean", jnp.zeros, (8,))
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * y.mean(0)
        self.sow("intermediates", "last", y)
        return nn.Dense(self.num_classes)(y - mean.value)


ACCEPTED = {
    "train, of a partial": ("Small", {}),
    "train, in a named axis": ("Small", {"axis_name": "batch"}),
    "training": ("Needed", {}),
    "is_training": ("Positional", {}),
    "deterministic": ("Opposite", {}),
    "nothing": ("Untold", {}),
    "any keyword": ("Passing", {}),
    "a collection": ("Remembering", {}),
}


def config(name, kwargs=None, **changes):
    settings = {
        "model__name": f"{__name__}:{name}",
        "model__kwargs": kwargs or {},
        "dataset__mixup": 0.0,
        "eval__batch_size": 8,
    }
    return running.config(**{**settings, "batch_size": 8, **changes})


def batch_of(experiment, size=8):
    rng = np.random.default_rng(0)
    fields = experiment.dataset.fields
    images = rng.integers(0, 256, (size, *fields["image"].shape)).astype(fields["image"].dtype)
    return {"image": images, "label": np.arange(size, dtype=np.int32) % 10}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_the_check_accepts_trains_and_is_evaluated(kind):
    name, kwargs = ACCEPTED[kind]
    experiment = build(config(name, kwargs))
    batch = batch_of(experiment)
    state = experiment.init()
    before = jax.device_get(state.params)
    after, metrics = experiment.compile_train_step()(state, put_batch(batch, experiment.mesh))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after.params), strict=True))
    mask = np.ones(8, np.float32)
    sums = experiment.jit_eval_step()(after.variables()[""], put_batch({**batch, "mask": mask}, experiment.mesh))
    assert sums["count"] == 8 and np.isfinite(sums["loss"])


@pytest.mark.parametrize("name", ["Needed", "Positional", "Opposite", "Renamed"])
def test_it_is_told_whether_it_trains_in_its_own_words(name):
    told = {"train_argument": "learning"} if name == "Renamed" else {}
    model = globals()[name](10)
    network, x = Network(model, **told), jnp.ones((4, 8, 8, 1))
    variables = network.init(jax.random.key(0), x)
    rngs = {"dropout": jax.random.key(1)}
    dropped, _ = network.step(variables, x, rngs["dropout"])
    whole = network.apply(variables, x, train=False)
    dense = variables["params"]["Dense_0"]
    np.testing.assert_allclose(whole, flat(x) @ dense["kernel"] + dense["bias"], rtol=1e-5)
    assert not np.allclose(dropped, whole)


def test_a_setting_says_what_a_signature_does_not():
    settings = {"model__train_argument": "learning", "model__outputs_argument": "words"}
    assert build(config("Renamed", **settings)).model == Renamed(10)
    assert config("Untold", {"num_classes": 10}, model__outputs_argument="none").build_model() == Untold(10)
    [said] = refused("Renamed", model__train_argument="learning")
    assert said == (
        f'model.outputs_argument: "auto", but {__name__}:Renamed takes no num_classes, num_outputs or features; name its'
        ' argument for the number of outputs, or set "none" if its outputs are what the objective takes'
    )
    [said] = refused("Renamed", model__outputs_argument="words")
    assert "missing 1 required keyword-only argument: 'learning'" in said
    [said] = refused("Untold", {"num_classes": 7})
    assert said.startswith("model.kwargs.num_classes: it is the number of outputs, which the data set gives")
    [said] = refused("Untold", model__outputs_argument="num_clases")
    assert said.endswith("has no such setting; did you mean num_classes?")
    assert refused("Untold", model__dtype="bfloat16") == [
        f"model.dtype: bfloat16; {__name__}:Untold takes no dtype, by which it would be told"
    ]
    [said] = refused("Untold", model__train_argument="not a name")
    assert said.startswith('model.train_argument: \'not a name\'; must be "auto", "none", the name of an argument, or')
    [said] = refused("IsTrain", model__train_argument="not is_trian")
    assert said == ("model.train_argument: 'not is_trian'; IsTrain.__call__ takes no such argument; did you mean is_train?")
    for name in ("IsTrain", "Switched", "Stored"):
        assert build(config(name, model__train_argument="none")).network.flags(train=True) == {}


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("IsTrain", "not is_train", 'needs PRNG for "dropout"'),
        ("Trained", "not train", 'Cannot update variable "mean"'),
        ("Inner", "auto", "unexpected keyword argument 'train'"),
        ("Renamed", "none", "missing 1 required keyword-only argument: 'learning'"),
    ],
)
def test_an_error_that_may_come_of_what_it_is_told_names_the_setting(name, argument, message):
    more = {"model__outputs_argument": "words"} if name == "Renamed" else {}
    [said] = refused(name, {"widths": (8,)} if name == "Trained" else {}, model__train_argument=argument, **more)
    told = "train" if name == "Inner" else argument
    assert message in said and said.endswith(f'; model.train_argument is how it is told whether it trains, here "{told}"')


def refused(name, kwargs=None, **changes):
    with pytest.raises(configs.ConfigError) as caught:
        config(name, kwargs, **changes)
    return caught.value.problems


class Both(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train=False, deterministic=True):
        return nn.Dense(self.num_classes)(flat(x))


class IsTrain(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, is_train=False):
        return nn.Dense(self.num_classes)(nn.Dropout(0.5)(flat(x), deterministic=not is_train))


class Switched(nn.Module):
    """It takes any keyword besides."""

    num_classes: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, *, pruned: "bool | None" = None, **kwargs):
        return nn.Dense(self.num_classes, self.use_bias)(flat(x))


class Stored(nn.Module):
    num_classes: int
    train: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(nn.Dropout(0.5)(flat(x), deterministic=not self.train))


class Inner(nn.Module):
    """Passes on what nobody takes."""

    num_classes: int

    @nn.compact
    def __call__(self, x, **kwargs):
        return Untold(self.num_classes)(x, **kwargs)


class Random(nn.Module):
    """Random in evaluation too."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(nn.Dropout(0.5, deterministic=False)(flat(x)))


class Carrying(nn.Module):
    """Its state has an axis for the batch."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        carry = self.variable("carry", "h", jnp.zeros, (len(x), 4))
        y = nn.Dense(4)(flat(x)) + carry.value
        if train and not self.is_initializing():
            carry.value = y
        return nn.Dense(self.num_classes)(y)


class Grouped(nn.Module):
    """Exchanges along an axis within groups, of which there are none."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(self.num_classes)(flat(x))
        return y if self.is_initializing() else lax.psum(y, "devices", axis_index_groups=[[0, 1], [2, 3]])


class Wide(nn.Module):
    """`features` are widths."""

    features: Sequence[int]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features[-1])(flat(x))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("Both", {}, 'model.train_argument: "auto", but Both takes both train and deterministic; set it to the one'),
        (
            "IsTrain",
            {},
            'model.train_argument: "auto", but IsTrain takes is_train; set it to "is_train", "not is_train" or "none"',
        ),
        ("Switched", {}, 'model.train_argument: "auto", but Switched takes pruned; set it to "pruned"'),
        (
            "Stored",
            {},
            'model.train_argument: "auto", but Stored has the setting train, which stays the same in evaluation; make',
        ),
        ("Random", {}, "in evaluation: "),
        ("Carrying", {}, "'carry/h', which it carries from step to step, is float32 [1, 4] at first and float32 [2, 4] after"),
        ("Grouped", {}, "the named axis 'devices' has no groups: a batch is one array over all devices here; leave out"),
        ("Wide", {"features": (8, 10)}, 'model.outputs_argument: "auto", but'),
    ],
)
def test_what_would_fail_later_is_refused_before(name, kwargs, message):
    [problem] = refused(name, kwargs)
    assert message in problem


def test_a_named_axis_is_the_whole_batch():
    named, plain = (Network(Trained((4,), 3, axis_name)) for axis_name in ("batch", None))
    x = jax.random.normal(jax.random.key(0), (6, 5, 5, 2))
    variables = plain.init(jax.random.key(1), x)
    for (ours, states), (theirs, other) in [(jax.jit(each.step)(variables, x, jax.random.key(2)) for each in (named, plain))]:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), states, other)


def test_what_layers_read_in_a_named_axis_can_be_captured():
    x = jax.random.normal(jax.random.key(0), (6, 5, 5, 2))
    moments = []
    for axis_name in ("batch", None):
        model = Trained((4,), 3, axis_name)
        planned = plan(model, x, [Rule(".*", rank=1)], train=True)
        moments.append(second_moments(model, model.init(jax.random.key(1), x), [x], planned, train=True))
    assert moments[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *moments)


def test_the_names_of_arguments_are_read_from_signatures():
    assert [train_argument(cls) for cls in (Trained, Needed, Positional, Opposite, Untold, Passing)] == [
        "train", "training", "is_training", "not deterministic", "none", "train",
    ]  # fmt: skip
    assert [Constructor(f"{__name__}:{name}").argument() for name in ("Small", "Needed", "Positional")] == [
        "num_classes", "num_outputs", "features",
    ]  # fmt: skip
    assert Constructor("resnet8").argument() == "num_classes"
