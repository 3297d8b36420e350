"""Every key of a config, its default and its legal values."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from lowrank_jax.checks import above, at_least, below_one
from lowrank_jax.experiment import optim
from lowrank_jax.experiment.best import Best
from lowrank_jax.experiment.data import datasets, splits
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.duration import Duration
from lowrank_jax.experiment.frozen import FrozenDict, freeze, thaw
from lowrank_jax.experiment.hosts.sharding import AXES, ShardingRule, mesh_sizes, read_rules
from lowrank_jax.experiment.network import AUTO, Constructor, Network, outputs_argument_problem, train_argument_problem
from lowrank_jax.experiment.objective import MSE, NAMES, SIGMOID, SOFTMAX, Objective, make_objective
from lowrank_jax.patterns import compile_pattern
from lowrank_jax.planning.budget import OBJECTIVES
from lowrank_jax.planning.chips import CHIPS
from lowrank_jax.planning.rules import Rule
from lowrank_jax.projection.methods import METHODS, TWO_SIDED
from lowrank_jax.text import did_you_mean


def _option(default: Any, check: Callable[[Any], str | None] | None = None) -> Any:
    """A field with a default and a check, which says what a value must be."""
    return dataclasses.field(default=default, metadata={"check": check})


def _between(low: float, high: float) -> Callable[[Any], str | None]:
    return lambda value: None if low <= value <= high else f"must be from {low:g} to {high:.10g}"


_SINGLE = 1e30
"""The largest number that leaves float32 room to compute with; its reciprocal is the smallest."""
_COUNT = 2**31 - 1
"""The largest number of images, or of anything else that is counted in 32 bits."""


def rate(value: float) -> str | None:
    """What is wrong with a learning rate, or another number above 0 that float32 computes with."""
    return above(0, _SINGLE)(value) or (None if value >= 1 / _SINGLE else f"must be at least {1 / _SINGLE:g}")


_weight = at_least(0, _SINGLE)


def _decay_rules(rules: tuple[tuple[str, float], ...]) -> str | None:
    for path, multiplier in rules:
        try:
            compile_pattern(path)
        except ValueError as error:
            return str(error)
        if complaint := _weight(multiplier):
            return f"the multiplier of {path!r} {complaint}"
    return None if rules else 'must not be empty; (".*", 0.0) decays nothing'


def _pattern(value: str) -> str | None:
    try:
        compile_pattern(value)
    except ValueError as error:
        return str(error)
    return None


def _path(value: str) -> str | None:
    return None if value and "\0" not in value else "must be the name of a folder"


def _fraction(value: float) -> str | None:
    return None if 0 < value <= 1 else "must be in (0, 1]"


def _deviations(values: tuple[float, ...]) -> str | None:
    return None if all(rate(value) is None for value in values) else "must be above 0"


def _area(value: tuple[float, float]) -> str | None:
    return None if 0 < value[0] <= value[1] <= 1 else "must be two fractions in (0, 1], the smaller one first"


def _window(value: tuple[int, int]) -> str | None:
    return None if 1 <= value[0] <= value[1] else "must be the first and the last step to trace, from 1"


def _axis_size(value: int) -> str | None:
    return None if value == -1 or 1 <= value <= 2**20 else "must be from 1 to 1048576, or -1 for all remaining devices"


def _one_of(*known: str) -> Callable[[str], str | None]:
    return lambda value: None if value in known else f"unknown{did_you_mean(value, known)}"


class _Hashable:
    """A section with mappings in it, which are frozen, so that a `Config` can be a key of a cache."""

    def __post_init__(self):
        for name in ("kwargs", "rules"):
            if hasattr(self, name):
                object.__setattr__(self, name, freeze(getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class DatasetConfig(_Hashable):
    """The data set, its splits, and how training images are augmented."""

    name: str = _option("digits", datasets.problem)
    data_dir: str | None = _option(None, _path)  # TFDS's own default
    train_split: str = "train"
    eval_split: str = "test"
    # Held out of training to choose checkpoints and learning rates by; evaluated along with eval_split.
    valid_split: str | None = None
    flip: bool = False
    crop_padding: int = _option(0, at_least(0))  # less than an image's side
    # For data sets whose images have many sizes: side in pixels, area of random crops, central crop in evaluation, and the
    # maximum number of undecodable images per split and process.
    image_size: int | None = _option(None, at_least(1, 2**14))
    crop_area: tuple[float, float] = _option((0.08, 1.0), _area)
    eval_crop: float = _option(0.875, _fraction)
    max_undecodable: int = _option(10, at_least(0))
    randaugment_layers: int = _option(0, at_least(0, 100))
    randaugment_magnitude: float = _option(9.0, _between(0, 10))
    random_erasing: float = _option(0.0, _between(0, 1))  # probability that a rectangle of an image is replaced by noise
    # Of the inputs, by channel or feature (pixels scaled to [0, 1]); None for the data set's own, or for those of the training
    # split, which are then computed once.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = _option(None, lambda values: _deviations(values))
    mixup: float = _option(0.0, at_least(0, 1000))  # alpha of the Beta distribution of mixing weights; 0: off
    cutmix: float = _option(0.0, at_least(0, 1000))  # the same; with both, each batch uses one of them
    kwargs: FrozenDict = FrozenDict()  # the data set's own settings

    def to_augmentation(self) -> Augmentation:
        """Augmentation of training images; which crop applies depends on the data set."""
        layers, magnitude = self.randaugment_layers, self.randaugment_magnitude
        return Augmentation(self.crop_area, self.crop_padding, self.flip, layers, magnitude)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Hashable):
    """A name that `lowrank_jax.models` knows, or code as "package.module:Class", and the model's own settings."""

    name: str = "resnet8"
    dtype: str = _option("float32", _one_of("float32", "bfloat16"))  # of the computation; parameters stay float32
    kwargs: FrozenDict = FrozenDict()
    # How it is told whether it trains and how many outputs to have: the names of its arguments.  auto: read from its signature;
    # none: it takes none; "not deterministic": an argument that says the opposite.
    train_argument: str = _option(AUTO, train_argument_problem)
    outputs_argument: str = _option(AUTO, outputs_argument_problem)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its schedule and its regularisation."""

    name: str = _option("sgd", _one_of(*optim.OPTIMIZERS))
    lr: float = _option(0.1, rate)
    lr_per_images: int | None = _option(None, at_least(1, _COUNT))  # the batch size that `lr` is for; None for any
    schedule: str = _option("cosine", _one_of(*optim.SCHEDULES))
    warmup: Duration = Duration(0, "step")
    step_at: tuple[Duration, ...] = ()  # where the schedule `step` multiplies the rate by `step_factor`
    step_every: Duration = _option(Duration(1, "epoch"), lambda d: _positive(d))  # the same for the schedule `exponential`
    step_factor: float = _option(0.1, _fraction)
    momentum: float = _option(0.9, below_one)
    nesterov: bool = True
    b1: float = _option(0.9, below_one)
    b2: float = _option(0.999, below_one)
    eps: float = _option(1e-8, rate)
    trust_coefficient: float = _option(0.001, rate)
    clip_norm: float | None = _option(None, rate)
    weight_decay: float = _option(0.0, _weight)
    # (path, multiple of weight_decay), in order; every parameter must be matched.
    decay_rules: tuple[tuple[str, float], ...] = _option(((optim.KERNELS, 1.0), (".*", 0.0)), _decay_rules)
    frobenius_decay: float = _option(0.0, _weight)
    nuclear_decay: float = _option(0.0, _weight)
    label_smoothing: float = _option(0.0, below_one)
    accumulate: int = _option(1, at_least(1))  # parts that a batch goes through the network in, one after the other
    ema_decay: float | None = _option(None, below_one)  # of the average of the weights, which then is what is evaluated


def _objective(name: str) -> str | None:
    return None if name in NAMES or ":" in name else f"unknown{did_you_mean(name, NAMES)}"


def _class_weights(value: tuple[float, ...] | str) -> str | None:
    if isinstance(value, str):
        return None if value == BALANCED else f'must be numbers, or "{BALANCED}"'
    if any(_weight(weight) for weight in value):
        return f"every one {next(filter(None, map(_weight, value)))}"
    return "must not all be 0" if value and not any(value) else None


BALANCED = "balanced"


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised and measured: a name, or a function of your own as "package.module:function" (see `objective`)."""

    name: str = _option(SOFTMAX, _objective)
    # Of softmax: its loss and its metrics by name, or functions of your own.
    loss: str = "softmax_cross_entropy"
    metrics: tuple[str, ...] = ("top1", "top5")
    # What the loss of each class counts in training: a number for each class, or "balanced": all classes count the same.
    class_weights: tuple[float, ...] | str = _option((), _class_weights)


def _amount(value: int | float) -> str | None:
    fits = value >= 1 if isinstance(value, int) else 0 < value <= 1
    return None if fits else "must be a fraction of the dense network above 0 and up to 1, such as 0.5, or a whole number"


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """What the network may cost, from which its ranks are chosen; see `lowrank_jax.allocate`.  One kind, or two at once.

    It takes the place of the general scale and rank, and the ranks of rules are the largest allowed.
    """

    params: int | float | None = _option(None, _amount)
    macs: int | float | None = _option(None, _amount)
    bytes: int | float | None = _option(None, _amount)
    seconds: float | None = _option(None, _fraction)  # of the dense training step on `chip`
    chip: str | None = _option(None, _one_of(*CHIPS))
    batch: int | None = _option(None, at_least(1, _COUNT))  # examples on a device at a time; None for all of batch_size
    rest: float = _option(0.0, at_least(0, 1e6))  # seconds of the dense training step besides its kernels
    objective: str = _option("tolerance", _one_of(*OBJECTIVES))  # what is to be least
    min_scale: float | None = _option(None, _between(0, 1))  # None: 0.05 (and rank 2) for seconds, 0 for others

    @property
    def amounts(self) -> dict[str, int | float]:
        """What is set, by kind."""
        given = {kind: getattr(self, kind) for kind in BUDGET_KINDS}
        return {kind: value for kind, value in given.items() if value is not None}


CURVATURE_OF = {SOFTMAX: "softmax", SIGMOID: "sigmoid", MSE: "squared"}
"""What `inputs.gradient_moments` calls the objectives."""

BUDGET_KINDS = ("params", "macs", "bytes", "seconds")
BUDGETS = tuple(f"lowrank.budget.{kind}" for kind in BUDGET_KINDS)
"""The keys of a config that ask for one."""


@dataclasses.dataclass(frozen=True)
class LowRankConfig(_Hashable):
    """Which kernels are factored and how; see `lowrank_jax.Rule`.  Method `none` is the dense network."""

    method: str = _option("kernel_projection", _one_of("none", *METHODS))
    scale: float | None = _option(0.25, _fraction)
    rank: int | None = _option(None, at_least(1))
    scheme: str = "channel"
    activation: str = "relu"
    multiple_of: int = 1
    scale_of: str = "full_rank"
    execution: str = "auto"
    moment_batches: int = _option(0, at_least(0))  # batches of images to estimate the layers' input moments from
    budget: BudgetConfig = BudgetConfig()
    # How long the network trains dense before it is factored; "auto": until its stable ranks settle.
    dense_warmup: Literal["auto"] | Duration | None = _option(None, lambda value: _warmup(value))
    self_guided: Duration | None = _option(None, lambda d: _positive(d))  # how long dense kernels guide the factors
    # Exceptions, first match wins: {"path": ..., and any of "energy", "rows", "normalized" and the keys up to execution}.
    rules: tuple[FrozenDict, ...] = ()

    def to_rules(self) -> tuple[Rule, ...]:
        """The rules in order, with a catch-all of the settings above at the end; none for the dense network.

        Raises:
          ValueError: a rule is not valid; one line a problem.
        """
        if self.method == "none":
            return ()
        common = {field: getattr(self, field) for field in _RULE_KEYS}
        if self.budget.amounts:
            common |= {"scale": 1.0, "rank": None}  # the largest allowed
        rules, problems = [], []
        for entry in (*self.rules, {"path": ".*"}):
            try:
                rules.append(_to_rule(common, entry))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return tuple(rules)


_KEYS_OF_ONE = ("path", "energy", "rows", "normalized")  # of a rule alone
_RULE_KEYS = ("method", "scale", "rank", "scheme", "activation", "multiple_of", "scale_of", "execution")


def _to_rule(common: dict[str, Any], entry: dict[str, Any]) -> Rule:
    known = (*_RULE_KEYS, *_KEYS_OF_ONE)
    unknown = [f"unknown key {key!r}{did_you_mean(key, known)}" for key in entry if key not in known]
    if "path" not in entry:
        unknown.append("no path")
    if unknown:
        raise ValueError(f"rule {dict(entry)}: {'; '.join(unknown)}")
    size = {"scale": None, "rank": None} if {"scale", "rank", "energy"} & set(entry) else {}
    settings = {**common, **size, **entry}
    if settings["method"] == "none":
        return Rule(entry["path"])
    try:
        return Rule(settings.pop("path"), **settings)
    except TypeError as error:
        raise ValueError(f"rule {dict(entry)}: {error}") from None


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """How the state before the first step is made."""

    # Trained weights of the dense network to begin with: "timm:NAME=FILE", a .safetensors file, a work directory (DIR@best, or
    # DIR@STEP), or an orbax checkpoint; and which parameters are drawn all the same, as a pattern.
    weights: str | None = _option(None, _path)
    redraw: str | None = _option(None, _pattern)
    # Where kernels are decomposed; the products UV of the two differ by rounding.
    svd: str = _option("device", _one_of("device", "host"))


def _best(text: str) -> str | None:
    try:
        Best.read(text)
    except ValueError as error:
        return str(error)
    return None


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, on `dataset.eval_split`; the final state is always evaluated."""

    every: Duration = _option(Duration(1, "epoch"), lambda d: _positive(d))
    batch_size: int = _option(512, at_least(1, _COUNT))
    # The metric that checkpoints and learning rates are chosen by: "top1", or "-loss" if lower is better.  None: the first of
    # objective.metrics, and "-loss" if another objective than softmax is set.
    best: str | None = _option(None, _best)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often to save, and how many of the latest checkpoints to keep besides the best."""

    every: Duration = _option(Duration(1, "epoch"), lambda d: _positive(d))
    keep: int = _option(2, at_least(2))  # the second is the fallback when the newest is damaged


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often training metrics are written, and whether for TensorBoard too, which imports TensorFlow."""

    every: Duration = _option(Duration(50, "step"), lambda d: _positive(d))
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """The first and the last training step to trace for TensorBoard's profiler."""

    steps: tuple[int, int] | None = _option(None, _window)


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Hashable):
    """Devices along each axis of the mesh; one axis may be -1 and takes the remaining devices."""

    data: int = _option(-1, _axis_size)
    fsdp: int = _option(1, _axis_size)
    model: int = _option(1, _axis_size)
    rules: tuple[FrozenDict, ...] = ()  # exceptions from the automatic sharding, in order: {"path": ..., "spec": ...}

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis, given their total."""
        return dict(zip(AXES, mesh_sizes(devices, self.data, self.fsdp, self.model), strict=True))

    @property
    def least_devices(self) -> int:
        """The fewest devices that fit: an axis of -1 gets one."""
        return math.prod(size for size in (self.data, self.fsdp, self.model) if size != -1)

    def to_rules(self) -> tuple[ShardingRule, ...]:
        return read_rules(self.rules)[0]  # `config` has reported what is wrong with them


def _warmup(value: Duration | str) -> str | None:
    return None if isinstance(value, str) else _positive(value)


def _positive(duration: Duration) -> str | None:
    return None if duration.amount > 0 else "must be above 0"


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment. Exactly one of `steps` and `epochs` is set."""

    seed: int = _option(0, _between(0, 2**32 - 1))  # jax would drop the bits beyond
    batch_size: int = _option(128, at_least(1, _COUNT))
    steps: int | None = _option(None, _between(1, _COUNT))
    epochs: float | None = _option(None, _between(1e-9, 1e9))
    # The lengths that the run had before it was made longer, each with how the learning rate goes on from there: (("30 epochs",
    # "restart"),) with epochs=60. A run that was extended is the one that has had this from its start.
    extensions: tuple[tuple[Duration, Literal["restart", "constant"]], ...] = ()
    # Where modules and relative paths of the code that is named here are looked up, besides the installed packages.  Reading a
    # config file sets it to the file's folder, or to the current one, if that is needed.
    code_dir: str | None = _option(None, _path)
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    lowrank: LowRankConfig = LowRankConfig()
    init: InitConfig = InitConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    mesh: MeshConfig = MeshConfig()

    def in_steps(self, duration: Duration) -> int:
        """A duration in steps of this experiment."""
        return duration.steps(self.batch_size, self.epoch_size)

    @property
    def epoch_size(self) -> int:
        return splits.split_size(self.description, self.dataset.train_split)

    @property
    def length(self) -> Duration:
        return Duration(self.steps, "step") if self.steps else Duration(self.epochs or 0, "epoch")

    @property
    def total_steps(self) -> int:
        return self.phase_ends[-1]

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """The last step of every phase: where the run is extended, and its end."""
        lengths = [*(length for length, _ in self.extensions), self.length]
        return tuple(max(1, self.in_steps(length)) for length in lengths)

    def earlier(self) -> "tuple[Config, ...]":
        """The experiments that this one extends, the latest first."""
        if not self.extensions:
            return ()
        *before, (length, _) = self.extensions
        in_epochs = length.unit == "epoch"
        steps, epochs = (None, length.amount) if in_epochs else (self.in_steps(length), None)
        extended = dataclasses.replace(self, steps=steps, epochs=epochs, extensions=tuple(before))
        return extended, *extended.earlier()

    @property
    def starts_dense(self) -> bool:
        """Whether the network that will be low-rank is dense at first."""
        return self.lowrank.dense_warmup is not None and self.lowrank.method != "none"

    @property
    def is_imported(self) -> bool:
        """Whether the network that is factored before the first step has trained weights."""
        return self.init.weights is not None and not self.starts_dense

    @property
    def curvature(self) -> str | None:
        """By which loss's curvature kernels are factored; None if their method needs none, or the loss is of the user's own."""
        given = self.objective
        if self.lowrank.method != TWO_SIDED or (given.name == SOFTMAX and given.loss != ObjectiveConfig.loss):
            return None
        return CURVATURE_OF.get(given.name)

    @property
    def dense_steps(self) -> int | None:
        """The last step of the dense warm-up, 0 without one; None if training itself will tell."""
        warmup = self.lowrank.dense_warmup
        if warmup is None or not self.starts_dense:
            return 0
        return None if warmup == "auto" else max(1, self.in_steps(warmup))

    @property
    def guided_steps(self) -> int:
        """The last step of self-guided training, 0 without it."""
        length = self.lowrank.self_guided
        return 0 if length is None or self.lowrank.method == "none" else max(1, self.in_steps(length))

    @property
    def latest_switch(self) -> int:
        """The step with which the dense or self-guided network makes way for the low-rank one at the latest, 0 without one."""
        dense = self.dense_steps
        return self.phase_ends[0] // 2 if dense is None else dense or self.guided_steps

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of this batch size."""
        per = self.optim.lr_per_images
        return self.optim.lr * self.batch_size / per if per else self.optim.lr

    @property
    def description(self) -> datasets.Dataset:
        """The data set's description; the user's own data is looked at for it; see `kept`.

        Raises:
          DataError: the user's own data cannot be used.
        """
        given = self.dataset
        dataset = datasets.describe(
            given.name,
            given.kwargs,
            image_size=given.image_size,
            decoding=self.decoding,
            data_dir=given.data_dir,
            code_dir=self.code_dir,
        )
        mean, std = given.mean, given.std
        return dataclasses.replace(
            dataset, mean=dataset.mean if mean is None else mean, std=dataset.std if std is None else std
        )

    @property
    def decoding(self) -> datasets.Decoding:
        """How images of many sizes are decoded."""
        return datasets.Decoding(self.dataset.eval_crop, self.dataset.max_undecodable)

    @property
    def best(self) -> Best:
        """The metric that checkpoints and learning rates are chosen by."""
        return Best.read(self.eval.best) if self.eval.best else Best.usual(self.objective.name, self.objective.metrics)

    @property
    def compared_by(self) -> str:
        """What other experiments must share to be compared with this one."""
        return self.best.measured_as(self.objective.name, self.objective.loss)

    @property
    def mixes(self) -> bool:
        """Whether labels of several examples or classes are mixed in training."""
        return bool(self.dataset.mixup or self.dataset.cutmix or self.optim.label_smoothing)

    @property
    def one_class(self) -> bool:
        """Whether the label of an example is one class."""
        dataset = self.description
        return dataset.num_classes is not None and not dataset.label.shape

    @property
    def target_classes(self) -> int | None:
        """The number of classes if labels become distributions over classes for training; None if they stay as they are."""
        dataset, name = self.description, self.objective.name
        if dataset.num_classes is None or name == MSE or (name == SIGMOID and not self.one_class):
            return None
        return dataset.num_classes if self.mixes or (self.one_class and name in NAMES) else None

    @property
    def num_outputs(self) -> int:
        """How many numbers the network gives for each example, or each place of it."""
        dataset, name = self.description, self.objective.name
        if name == MSE or (name == SIGMOID and not self.one_class):
            return dataset.label.shape[-1] if dataset.label.shape else 1
        return dataset.outputs

    def build_objective(self, class_weights: tuple[float, ...] = ()) -> Objective:
        """What is minimised and measured.

        Args:
          class_weights: where they are to be counted, what was found.

        Raises:
          ValueError: it names code that cannot be imported.
        """
        given = self.objective
        weights = class_weights if given.class_weights == BALANCED else given.class_weights
        return make_objective(
            given.name,
            given.loss,
            given.metrics,
            best=self.best,
            one_class=self.one_class,
            class_weights=() if isinstance(weights, str) else weights,
            folder=self.code_dir,
        )

    @property
    def constructor(self) -> Constructor:
        """What makes the model."""
        return Constructor(self.model.name, self.model.outputs_argument, self.code_dir)

    def build_model(self) -> nn.Module:
        """The Linen module, not initialised.

        Raises:
          ValueError, TypeError: it cannot be made; the message says why.
        """
        dtype = {} if self.model.dtype == "float32" else {"dtype": jnp.dtype(self.model.dtype)}
        return self.constructor.make(self.num_outputs, {**dtype, **thaw(self.model.kwargs)})

    def build_network(self) -> Network:
        """The same, as it is called."""
        return Network(self.build_model(), self.model.train_argument)
