"""The settings of an experiment: every legal key with its default, and one strict reading of what a config file gives.

A config file defines `get_config()` and returns a `ConfigDict`: `default()` with some values changed.  `parse` reads it once,
completely, into the frozen dataclasses below, and reports all that is wrong with it at the same time.
"""

import ast
import dataclasses
import importlib.util
import math
import pathlib
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from lowrank_jax import models, optim
from lowrank_jax.data import datasets
from lowrank_jax.methods import METHODS
from lowrank_jax.paths import did_you_mean
from lowrank_jax.ranks import Rule


class ConfigError(Exception):
    """What is wrong with a config or a command line, one problem an entry."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training: "500", "500 steps", "2 epochs" or "1e6 examples"."""

    amount: float
    unit: str

    @classmethod
    def read(cls, value: Any) -> "Duration":
        """Raises ValueError if it does not read as a duration."""
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(step|epoch|example)?s?", str(value).strip())
        try:
            return cls(float(match[1]), match[2] or "step")  # type: ignore[index]
        except (TypeError, ValueError):
            raise ValueError('a duration such as "500 steps" or "2 epochs"') from None

    def steps(self, batch_size: int, epoch_size: int) -> int:
        """In whole steps."""
        examples = {"step": batch_size, "epoch": epoch_size, "example": 1}[self.unit]
        return math.floor(self.amount * examples / batch_size + 0.5)

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}s"


def _option(default: Any, check: Callable[[Any], str | None] | None = None) -> Any:
    """A field with a default and a test that names what a value must be."""
    return dataclasses.field(default=default, metadata={"check": check})


def _at_least(low: float) -> Callable[[Any], str | None]:
    return lambda value: None if low <= value < math.inf else f"must be at least {low:g}"


def _above(low: float) -> Callable[[Any], str | None]:
    return lambda value: None if low < value < math.inf else f"must be above {low:g}"


def _fraction(value: float) -> str | None:
    return None if 0 < value <= 1 else "must be in (0, 1]"


def _below_one(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be in [0, 1)"


def _axis_size(value: int) -> str | None:
    return None if value >= 1 or value == -1 else "must be at least 1, or -1 for all devices that are left"


def _one_of(*known: str) -> Callable[[str], str | None]:
    return lambda value: None if value in known else f"unknown{did_you_mean(value, known)}"


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Which images, and how they are varied in training."""

    name: str = _option("digits", _one_of(*datasets.NAMES))
    data_dir: str | None = None  # TFDS's own default
    train_split: str = "train"
    eval_split: str = "test"
    flip: bool = False
    crop_padding: int = _option(0, _at_least(0))
    kwargs: dict = dataclasses.field(default_factory=dict)  # of `synthetic`


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A name that `models.build` knows, or "package.module:attribute", and the model's own settings."""

    name: str = "resnet8"
    kwargs: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its schedule and its regularisation."""

    name: str = _option("sgd", _one_of(*optim.OPTIMIZERS))
    lr: float = _option(0.1, _above(0))
    schedule: str = _option("cosine", _one_of(*optim.SCHEDULES))
    warmup: Duration = Duration(0, "step")
    step_at: tuple[Duration, ...] = ()  # where the schedule `step` multiplies the rate by `step_factor`
    step_factor: float = _option(0.1, _fraction)
    momentum: float = _option(0.9, _below_one)
    nesterov: bool = True
    b1: float = _option(0.9, _below_one)
    b2: float = _option(0.999, _below_one)
    eps: float = _option(1e-8, _above(0))
    clip_norm: float | None = _option(None, _above(0))
    weight_decay: float = _option(0.0, _at_least(0))
    # (path, multiple of weight_decay), in order; every parameter must be matched.
    decay_rules: tuple[tuple[str, float], ...] = ((r"(.*/)?(kernel|embedding)(/[uv])?", 1.0), (".*", 0.0))
    frobenius_decay: float = _option(0.0, _at_least(0))
    label_smoothing: float = _option(0.0, _below_one)


@dataclasses.dataclass(frozen=True)
class LowRankConfig:
    """Which kernels are factored and how; see `lowrank_jax.Rule`.  Method `none` is the dense arm."""

    method: str = _option("kernel_projection", _one_of("none", *METHODS))
    scale: float | None = _option(0.25, _fraction)
    rank: int | None = _option(None, _at_least(1))
    scheme: str = "channel"
    activation: str = "relu"
    multiple_of: int = 1
    scale_of: str = "full_rank"
    rules: tuple[dict, ...] = ()  # exceptions by path, in order: {"path": ..., and any of the keys above}

    def to_rules(self) -> tuple[Rule, ...]:
        """The rules in order, a catch-all with the settings above at the end; none for the dense arm.

        Raises:
          ValueError: a rule is not valid; one line a problem.
        """
        if self.method == "none":
            return ()
        common = {field: getattr(self, field) for field in _RULE_KEYS}
        rules, problems = [], []
        for entry in (*self.rules, {"path": ".*"}):
            try:
                rules.append(_to_rule(common, entry))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return tuple(rules)


_RULE_KEYS = ("method", "scale", "rank", "scheme", "activation", "multiple_of", "scale_of")


def _to_rule(common: dict[str, Any], entry: dict[str, Any]) -> Rule:
    unknown = [f"unknown key {key!r}{did_you_mean(key, _RULE_KEYS)}" for key in entry if key not in ("path", *_RULE_KEYS)]
    if "path" not in entry:
        unknown.append("no path")
    if unknown:
        raise ValueError(f"rule {dict(entry)}: {'; '.join(unknown)}")
    size = {"scale": None, "rank": None} if {"scale", "rank"} & set(entry) else {}
    settings = {**common, **size, **entry}
    if settings["method"] == "none":
        return Rule(entry["path"])
    try:
        return Rule(settings.pop("path"), **settings)
    except TypeError as error:
        raise ValueError(f"rule {dict(entry)}: {error}") from None


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, on `dataset.eval_split`; the end of training is always evaluated."""

    every: Duration = _option(Duration(1, "epoch"), lambda d: _positive(d))
    batch_size: int = _option(512, _at_least(1))


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often to save, and how many of the latest to keep besides the best."""

    every: Duration = _option(Duration(1, "epoch"), lambda d: _positive(d))
    keep: int = _option(2, _at_least(2))  # one to fall back on when the newest is damaged


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often training metrics are written."""

    every: Duration = _option(Duration(50, "step"), lambda d: _positive(d))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1, which takes all that are left."""

    data: int = _option(-1, _axis_size)
    fsdp: int = _option(1, _axis_size)
    model: int = _option(1, _axis_size)


def _positive(duration: Duration) -> str | None:
    return None if duration.amount > 0 else "must be above 0"


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment.  Exactly one of `steps` and `epochs` says how long it trains."""

    seed: int = _option(0, _at_least(0))
    batch_size: int = _option(128, _at_least(1))
    steps: int | None = _option(None, _at_least(1))
    epochs: float | None = _option(None, _above(0))
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    lowrank: LowRankConfig = LowRankConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()

    def in_steps(self, duration: Duration) -> int:
        """A duration in whole steps of this experiment."""
        return duration.steps(self.batch_size, self.epoch_size)

    @property
    def epoch_size(self) -> int:
        return datasets.split_size(self.description, self.dataset.train_split)

    @property
    def total_steps(self) -> int:
        return self.steps or max(1, self.in_steps(Duration(self.epochs or 0, "epoch")))

    @property
    def description(self) -> datasets.Dataset:
        """What is known of the data set without reading it."""
        return datasets.describe(self.dataset.name, self.dataset.kwargs)

    def build_model(self):
        return models.build(self.model.name, num_classes=self.description.num_classes, **self.model.kwargs)


def default() -> Any:
    """A `ConfigDict` of every legal key with its default, for a config file to change.  Types are checked by `parse`."""
    return ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(config: Any) -> dict[str, Any]:
    """A parsed config as plain values that JSON can hold and `parse` reads back."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value


def load(path: str) -> ConfigDict:
    """Runs `get_config()` of a config file; "file.py:argument" calls it with the argument.

    Raises:
      ConfigError: there is no such file, or it fails.
    """
    name, _, argument = path.partition(":")
    file = pathlib.Path(name)
    if not file.is_file():
        known = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ConfigError(path, [f"there is no such file{did_you_mean(name, known)}"])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except Exception as error:  # whatever somebody's file may raise
        raise ConfigError(path, [f"it fails with {type(error).__name__}: {error}"]) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(path, [f"get_config() must return a ConfigDict, not {type(config).__name__}"])
    return config


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets a dotted key to a value given as text, read by the key's type; `parse` judges key and value afterwards."""
    *sections, last = key.split(".")
    hint = _hint(key)
    keep_text = hint is str or hint is Duration
    with config.unlocked():
        node: Any = config
        for section in sections:
            if not isinstance(node.get(section), ConfigDict):
                node[section] = ConfigDict(type_safe=False)
            node = node[section]
        node[last] = text if keep_text else _literal(text)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _hint(key: str) -> Any:
    """The type of a dotted key; None where there is no such key or the model decides."""
    cls: Any = Config
    for part in key.split("."):
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if part not in hints:
            return None
        cls = hints[part]
    return cls


def legal_keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key that a config may set."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(hint) and hint is not Duration
        keys += legal_keys(hint, f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def parse(config: ConfigDict | dict[str, Any], *, source: str = "config", devices: int | None = None) -> Config:
    """Reads a config once and completely.

    Args:
      config: as a config file returns it, or as `to_dict` wrote it.
      source: what to call it in messages.
      devices: how many devices there are; None to leave the mesh unjudged.

    Raises:
      ConfigError: with all problems.
    """
    problems: list[str] = []
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    parsed = _section(Config, values, "", problems)
    problems += _relations(parsed, devices, {problem.split(":")[0] for problem in problems})
    if problems:
        raise ConfigError(source, problems)
    return parsed


def _section(cls: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """A dataclass from a mapping; a field that cannot be read keeps its default, and its problem is noted."""
    hints, read = typing.get_type_hints(cls), {}
    for key in values:
        if key not in hints:
            problems.append(f"{prefix}{key}: unknown key{did_you_mean(prefix + str(key), _known(cls, prefix))}")
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        name, value, hint = prefix + field.name, values[field.name], hints[field.name]
        if dataclasses.is_dataclass(hint) and hint is not Duration:
            if isinstance(value, dict):
                read[field.name] = _section(hint, value, name + ".", problems)
            else:
                problems.append(f"{name}: {value!r}; must be a section with keys of its own")
            continue
        try:
            value = _typed(value, hint)
        except ValueError as error:
            problems.append(f"{name}: {value!r}; must be {error}")
            continue
        check = field.metadata.get("check")
        complaint = check(value) if check and value is not None else None
        if complaint:
            problems.append(f"{name}: {value if isinstance(value, Duration) else repr(value)}; {complaint}")
        else:
            read[field.name] = value
    return cls(**read)


def _known(cls: Any, prefix: str) -> list[str]:
    return legal_keys() if cls is Config or prefix.split(".")[0] in typing.get_type_hints(Config) else legal_keys(cls, prefix)


def _typed(value: Any, hint: Any) -> Any:
    """The value as the hinted type; a ValueError that names the type if it is not one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _typed(value, next(arg for arg in args if arg is not type(None)))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError("one of " + ", ".join(map(repr, args)))
        return value
    if hint is Duration:
        return value if isinstance(value, Duration) else Duration.read(value)
    if origin is not None and issubclass(origin, Sequence):
        return _typed_tuple(value, args)
    if hint is dict and isinstance(value, dict):
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is Any:
        return value
    kinds = {int: "a whole number", float: "a number", bool: "True or False", str: "text", dict: "a mapping"}
    raise ValueError(kinds.get(hint, str(hint)))


def _typed_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("a sequence, such as (1, 2)")
    if len(args) != 2 or args[1] is not Ellipsis:
        homogeneous = len(args) == 1
        if not homogeneous and len(value) != len(args):
            raise ValueError(f"a sequence of {len(args)}")
        return tuple(_typed(item, args[0] if homogeneous else arg) for item, arg in zip(value, args * len(value)))  # noqa: B905
    return tuple(_typed(item, args[0]) for item in value)


def _relations(config: Config, devices: int | None, wrong: set[str]) -> list[str]:
    """What is wrong between values that are right each by itself; `wrong` are the keys already reported."""
    problems: list[str] = []
    if config.steps is None and config.epochs is None and not wrong & {"steps", "epochs"}:
        problems.append("steps: neither steps nor epochs is given")
    if config.steps is not None and config.epochs is not None:
        problems.append(f"steps: both steps ({config.steps}) and epochs ({config.epochs:g}) are given; set one to None")
    if not wrong & {"dataset.name"}:
        problems += _dataset_problems(config, wrong)
    problems += _model_problems(config)
    problems += _rule_problems(config, wrong)
    problems += _mesh_problems(config, devices) if devices else []
    return problems


def _dataset_problems(config: Config, wrong: set[str]) -> list[str]:
    options = datasets.SyntheticOptions if config.dataset.name == "synthetic" else None
    problems: list[str] = []
    if options:
        _section(options, config.dataset.kwargs, "dataset.kwargs.", problems)
    else:
        problems += [f"dataset.kwargs.{key}: {config.dataset.name} takes none" for key in config.dataset.kwargs]
    if problems:
        return problems
    for key in ("train_split", "eval_split"):
        try:
            datasets.split_size(config.description, getattr(config.dataset, key))
        except ValueError as error:
            problems.append(f"dataset.{key}: {error}")
    if not problems and not wrong & {"steps", "epochs", "batch_size", "optim.warmup"} and (config.steps or config.epochs):
        warmup = config.in_steps(config.optim.warmup)
        if warmup > config.total_steps:
            problems.append(f"optim.warmup: {warmup} steps; longer than the training of {config.total_steps} steps")
    return problems


def _model_problems(config: Config) -> list[str]:
    try:
        settings = models.settings(config.model.name)
    except ValueError as error:
        return [f"model.name: {error}"]
    if settings is None:
        return []
    problems = []
    for key, value in config.model.kwargs.items():
        if key not in settings:
            problems.append(f"model.kwargs.{key}: {config.model.name} has no such setting{did_you_mean(key, settings)}")
            continue
        try:
            _typed(value, settings[key])
        except ValueError as error:
            problems.append(f"model.kwargs.{key}: {value!r}; must be {error}")
    return problems


def _rule_problems(config: Config, wrong: set[str]) -> list[str]:
    low = config.lowrank
    if low.method != "none" and low.scale is None and low.rank is None and not wrong & {"lowrank.scale", "lowrank.rank"}:
        return ["lowrank.scale: neither scale nor rank is given; the dense arm is lowrank.method=none"]
    if low.scale is not None and low.rank is not None:
        # A scale that was reported as wrong has fallen back to its default: not the user's.
        return [] if wrong & {"lowrank.scale"} else [f"lowrank.rank: {low.rank} beside scale {low.scale:g}; set one to None"]
    try:
        low.to_rules()
    except ValueError as error:
        return [f"lowrank: {line}" for line in str(error).splitlines()]
    return []


def _mesh_problems(config: Config, devices: int) -> list[str]:
    axes = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "model")}
    fixed = math.prod(size for size in axes.values() if size != -1)
    free = [axis for axis, size in axes.items() if size == -1]
    if len(free) > 1:
        return [f"mesh.{free[1]}: -1, and so is mesh.{free[0]}; only one axis can take what is left"]
    if devices % fixed or (not free and fixed != devices):
        return [f"mesh.data: a mesh of {'x'.join(str(size) for size in axes.values())} does not fit {devices} devices"]
    sizes = {axis: devices // fixed if size == -1 else size for axis, size in axes.items()}
    shards = sizes["data"] * sizes["fsdp"]
    return [
        f"{key}: {size}; must be a multiple of the {shards} devices that share a batch"
        for key, size in (("batch_size", config.batch_size), ("eval.batch_size", config.eval.batch_size))
        if size % shards
    ]
