"""One strict reading of a config file and its overrides.

A config file defines `get_config()` and returns a `ConfigDict`: `default()` with some values changed.  `parse` reads it once,
completely, into the frozen dataclasses of `schema`, and reports all that is wrong with it at the same time.
"""

import ast
import dataclasses
import importlib.util
import inspect
import math
import pathlib
import types
import typing
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lowrank_jax import models
from lowrank_jax.experiment.config.schema import Config, DatasetConfig, Duration
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.hosts.sharding import AXES, read_rules, rule_problems
from lowrank_jax.planning import factorize as surgery
from lowrank_jax.planning.plans import Plan
from lowrank_jax.text import did_you_mean, first_line


class ConfigError(Exception):
    """What is wrong with a config or a command line, one problem an entry."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


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
    if spec is None or spec.loader is None:
        raise ConfigError(path, ["it is not a Python file"])
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if argument and not inspect.signature(module.get_config).parameters:
            raise ConfigError(path, [f"{name} takes no argument, such as {argument!r}"])
        config = module.get_config(argument) if argument else module.get_config()
    except ConfigError as error:  # of a config that this one changes
        raise ConfigError(path, error.problems) from error
    except (Exception, SystemExit) as error:  # whatever somebody's file may raise
        raise ConfigError(path, [f"it fails with {type(error).__name__}: {error}"]) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(path, [f"get_config() must return a ConfigDict, not {type(config).__name__}"])
    return config


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets a dotted key to a value given as text, read by the key's type; `parse` judges key and value afterwards."""
    *sections, last = key.split(".")
    hint = _hint(key)
    # Where the model decides, "none" may be one of its words, such as the norm of a ResNet; None is Python's.
    keep_text = hint is str or hint is Duration or (hint is None and text == "none")
    with config.unlocked():
        node: Any = config
        for section in sections:
            if not isinstance(node.get(section), ConfigDict):
                node[section] = ConfigDict(type_safe=False)
            node = node[section]
        node[last] = _unquoted(text) if keep_text else _literal(text)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
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
    """The keys to propose for an unknown one: all of the config's, or those of a section that is not part of it."""
    return legal_keys() if cls is Config or _hint(prefix[:-1]) is cls else legal_keys(cls, prefix)


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
    if hint not in kinds:  # some other model's own type, which only it can judge
        return value
    raise ValueError(kinds[hint])


def _typed_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("a sequence, such as (1, 2)")
    if len(args) == 1 or args[1:] == (Ellipsis,):  # Sequence[int], or tuple[int, ...]
        return tuple(_typed(item, args[0]) for item in value)
    if len(value) != len(args):
        raise ValueError(f"a sequence of {len(args)}")
    return tuple(_typed(item, arg) for item, arg in zip(value, args, strict=True))


def _relations(config: Config, devices: int | None, wrong: set[str]) -> list[str]:
    """What is wrong between values that are right each by itself; `wrong` are the keys already reported."""
    problems: list[str] = []
    if config.optim.schedule == "step" and not config.optim.step_at and not wrong & {"optim.schedule", "optim.step_at"}:
        problems.append('optim.step_at: empty; the schedule "step" needs at least one, such as ("30 epochs",)')
    if config.steps is None and config.epochs is None and not wrong & {"steps", "epochs"}:
        problems.append("steps: neither steps nor epochs is given")
    if config.steps is not None and config.epochs is not None:
        problems.append(f"steps: both steps ({config.steps}) and epochs ({config.epochs:g}) are given; set one to None")
    if config.batch_size % config.optim.accumulate and not wrong & {"batch_size", "optim.accumulate"}:
        problems.append(f"optim.accumulate: {config.optim.accumulate}; batch_size {config.batch_size} is no multiple of it")
    parts = [] if wrong & {"dataset.name"} else _dataset_problems(config, wrong)
    parts += _model_problems(config) + _rule_problems(config, wrong)
    if not parts and not any(key.startswith(("dataset.", "model.", "lowrank.")) for key in wrong):
        parts = _plan_problems(config)
    problems += parts
    mesh = _mesh_problems(config, devices) if devices else []
    problems += mesh
    if not mesh and not problems and not any(key.startswith(("dataset.", "model", "mesh.")) for key in wrong):
        problems += _mesh_rule_problems(config, devices)
    return problems


def _dataset_problems(config: Config, wrong: set[str]) -> list[str]:
    options = datasets.OPTIONS.get(config.dataset.name)
    problems: list[str] = []
    if options:
        _section(options, config.dataset.kwargs, "dataset.kwargs.", problems)
    else:
        problems += [f"dataset.kwargs.{key}: {config.dataset.name} takes none" for key in config.dataset.kwargs]
    problems = problems or _image_problems(config)
    if problems:
        return problems
    for key in ("train_split", "eval_split", "valid_split"):
        split = getattr(config.dataset, key)
        if split is None:
            continue
        try:
            datasets.split_size(config.description, split)
        except ValueError as error:
            problems.append(f"dataset.{key}: {first_line(error)}")
    if not problems and config.dataset.valid_split:
        problems += _overlaps(config)
    if not problems and not wrong & {"steps", "epochs", "batch_size", "optim.warmup"} and (config.steps or config.epochs):
        warmup = config.in_steps(config.optim.warmup)
        if config.total_steps >= 2**31:
            problems.append(f"epochs: {config.epochs:g}; more than 2^31 steps")
        traced = config.profile.steps
        if traced and traced[1] > config.total_steps:
            problems.append(f"profile.steps: {traced}; beyond the training of {config.total_steps} steps")
        if warmup > config.total_steps:
            problems.append(f"optim.warmup: {warmup} steps; longer than the training of {config.total_steps} steps")
    return problems


_DECODING_KEYS = ("image_size", "crop_area", "eval_crop", "max_undecodable")


def _image_problems(config: Config) -> list[str]:
    """What is asked of images that are not of that kind."""
    given, dataset, name = config.dataset, config.description, config.dataset.name
    if "train" not in dataset.sizes:
        return [f"dataset.name: {name!r}; it is for evaluation only: lowrank evaluate --dataset={name}"]
    height, width, channels = dataset.image_shape
    problems = []
    if dataset.decoding is None:
        problems += [
            f"dataset.{key}: {getattr(given, key)!r}; {name} is stored at {height}x{width}, which stays as it is"
            for key in _DECODING_KEYS
            if getattr(given, key) != getattr(DatasetConfig(), key)
        ]
    elif given.crop_padding:
        problems.append(f"dataset.crop_padding: {given.crop_padding}; {name} is cropped by dataset.crop_area instead")
    if given.randaugment_layers and channels != 3:
        problems.append(f"dataset.randaugment_layers: {given.randaugment_layers}; RandAugment needs colours, {name} has none")
    return problems


def _overlaps(config: Config) -> list[str]:
    """What is chosen on examples that were trained on, or are reported on, is not chosen honestly."""
    held_out = config.dataset.valid_split or ""
    return [
        f"dataset.valid_split: {held_out!r}; shares examples with dataset.{key}, {getattr(config.dataset, key)!r}"
        for key in ("train_split", "eval_split")
        if datasets.share_examples(config.description, held_out, getattr(config.dataset, key))
    ]


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


def _plan_problems(config: Config) -> list[str]:
    try:
        make_plan(config)
    except ConfigError as error:
        return error.problems
    return []


def make_plan(config: Config) -> Plan:
    """Which of the model's kernels are factored; nothing is computed.  A second time the answer is at hand.

    Raises:
      ConfigError: the model cannot be built on these images, or a rule does not fit it.
    """
    parts = repr((config.model, config.dataset, config.lowrank))
    if parts not in _PLANS:
        _PLANS[parts] = _make_plan(config)
    return _PLANS[parts]


_PLANS: dict[str, Plan] = {}


def _make_plan(config: Config) -> Plan:
    outputs: list[Any] = []

    def note_output(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if not context.module.path:
            outputs.append(output)
        return output

    try:
        model = config.build_model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{config.model.name} makes {type(model).__name__}, which is not a Linen module")
        with nn.intercept_methods(note_output):
            plan = surgery.plan(model, images_like(config), config.lowrank.to_rules())
    except Exception as error:  # whatever somebody's model may raise
        raise ConfigError("config", [f"model or lowrank: {line}" for line in _lines(error)]) from error
    _check_logits(config, outputs[-1])  # the outermost module returns last
    return plan


def _check_logits(config: Config, output: Any) -> None:
    """Raises ConfigError unless a model's output for one image is a logit for each class."""
    dataset, model = config.description, config.model.name
    shape = getattr(output, "shape", None)
    if shape is None or len(shape) != 2:
        found = f"{type(output).__name__}" if shape is None else f"shape {shape}"
        raise ConfigError("config", [f"model: {model} gives {found} for a batch of one, not logits [1, {dataset.num_classes}]"])
    if shape[1] != dataset.num_classes:
        raise ConfigError(
            "config", [f"model: {model} gives {shape[1]} logits, {dataset.name} has {dataset.num_classes} classes"]
        )


def images_like(config: Config) -> jax.ShapeDtypeStruct:
    """One image of the config's data set, for tracing a model."""
    return jax.ShapeDtypeStruct((1, *config.description.image_shape), jnp.float32)


def _lines(error: Exception) -> list[str]:
    """An error as one line; our own ValueErrors hold a problem a line."""
    ours = isinstance(error, ValueError) and str(error).startswith(("rule ", "setting "))
    return str(error).splitlines() if ours else [first_line(error)[:300]]


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


def _mesh_rule_problems(config: Config, devices: int | None) -> list[str]:
    """What of the sharding rules does not fit the network, or the mesh as far as it is known."""
    if not config.mesh.rules:
        return []
    rules, problems = read_rules(config.mesh.rules)
    sizes = config.mesh.sizes(devices) if devices else {axis: getattr(config.mesh, axis) for axis in AXES}
    known = {axis: size for axis, size in sizes.items() if size != -1}
    model = config.build_model()
    variables = jax.eval_shape(lambda images: model.init(jax.random.key(0), images), images_like(config))
    problems += rule_problems(rules, nn.meta.unbox(variables["params"]), known)
    return [f"mesh.rules: {problem}" for problem in problems]


def _mesh_problems(config: Config, devices: int) -> list[str]:
    axes = {axis: getattr(config.mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in axes.values() if size != -1)
    free = [axis for axis, size in axes.items() if size == -1]
    if len(free) > 1:
        return [f"mesh.{free[1]}: -1, and so is mesh.{free[0]}; only one axis can take what is left"]
    if devices % fixed or (not free and fixed != devices):
        return [f"mesh.data: a mesh of {'x'.join(str(size) for size in axes.values())} does not fit {devices} devices"]
    sizes = {axis: devices // fixed if size == -1 else size for axis, size in axes.items()}
    shards = sizes["data"] * sizes["fsdp"]
    problems = [
        f"{key}: {size}; must be a multiple of the {shards} devices that share a batch"
        for key, size in (("batch_size", config.batch_size), ("eval.batch_size", config.eval.batch_size))
        if size % shards
    ]
    parts = config.optim.accumulate
    if not problems and config.batch_size % parts == 0 and config.batch_size % (shards * parts):
        problems.append(f"optim.accumulate: {parts}; {config.batch_size} images cannot be cut in so many on {shards} devices")
    return problems
