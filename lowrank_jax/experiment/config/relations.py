"""Checks between the values of a config, and against its data set, model and devices."""

import math
from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.experiment.config import factors, objectives
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.plan import check_plan, images_like
from lowrank_jax.experiment.config.schema import Config, DatasetConfig, rate
from lowrank_jax.experiment.config.typed import read_section, read_value
from lowrank_jax.experiment.data import datasets, splits
from lowrank_jax.experiment.hosts.sharding import AXES, read_rules, rule_problems
from lowrank_jax.text import first_line, shown


def relation_problems(config: Config, devices: int | None, wrong: set[str]) -> list[str]:
    """Problems between values that are valid by themselves; `wrong` are the keys already reported."""
    problems: list[str] = []
    if config.optim.schedule == "step" and not config.optim.step_at and not wrong & {"optim.schedule", "optim.step_at"}:
        problems.append('optim.step_at: empty; schedule "step" needs at least one entry, e.g. ("30 epochs",)')
    if config.steps is None and config.epochs is None and not wrong & {"steps", "epochs"}:
        problems.append("steps: neither steps nor epochs is set")
    if config.steps is not None and config.epochs is not None:
        problems.append(f"steps: both steps ({config.steps}) and epochs ({config.epochs:g}) are set; set one to None")
    if not wrong & {"optim.lr", "optim.lr_per_images", "batch_size"} and (complaint := rate(config.peak_lr)):
        problems.append(f"optim.lr: {config.peak_lr:g} for batches of {config.batch_size} images; {complaint}")
    if config.batch_size % config.optim.accumulate and not wrong & {"batch_size", "optim.accumulate"}:
        problems.append(f"optim.accumulate: {config.optim.accumulate}; batch_size {config.batch_size} is not a multiple of it")
    data = [] if wrong & {"dataset.name"} else _unreadable(config)
    known = not data and not any(key.startswith("dataset") for key in wrong)
    if not data and not wrong & {"dataset.name"}:
        data = _dataset_problems(config, wrong)
    if not any(key.startswith(("objective", "eval.best", "code_dir")) for key in wrong):
        objective = objectives.problems(config, config.description if known else None)
        problems += objective
    else:
        objective = ["of its own"]
    parts = _model_problems(config) + factors.problems(config, wrong)
    if known and not parts and not objective and not any(key.startswith(("model.", "lowrank.")) for key in wrong):
        parts = _plan_problems(config)
    problems += data + parts
    mesh = _mesh_problems(config, devices) if devices else []
    problems += mesh
    if not mesh and not problems and not any(key.startswith(("dataset.", "model", "mesh.")) for key in wrong):
        problems += _mesh_rule_problems(config, devices)
    return problems


def _unreadable(config: Config) -> list[str]:
    """Why nothing is known of the data: wrong settings of its source, or data of the user's own that cannot be used."""
    source = datasets.find(config.dataset.name)
    problems: list[str] = []
    if source.options:
        read_section(source.options, config.dataset.kwargs, "dataset.kwargs.", problems)
    elif not source.free_options:
        problems += [f"dataset.kwargs.{key}: {config.dataset.name} has no settings" for key in config.dataset.kwargs]
    return problems or _data_problems(config)


def _dataset_problems(config: Config, wrong: set[str]) -> list[str]:
    """Settings that do not fit the data."""
    if problems := _evaluated_only(config):
        return problems
    images, problems = _image_problems(config), []
    for key in ("train_split", "eval_split", "valid_split"):
        split = getattr(config.dataset, key)
        if split is None:
            continue
        try:
            splits.split_size(config.description, split)
        except ValueError as error:
            problems.append(f"dataset.{key}: {first_line(error)}")
    if not problems and config.dataset.valid_split:
        problems += _overlaps(config)
    if not problems and not wrong & {"steps", "epochs", "batch_size", "optim.warmup"} and (config.steps or config.epochs):
        problems += _length_problems(config)
        problems += _phase_problems(config)
        traced = config.profile.steps
        if traced and traced[1] > config.total_steps:
            problems.append(f"profile.steps: {traced}; training ends at step {config.total_steps}")
    return images + problems


def _phase_problems(config: Config) -> list[str]:
    """A warm-up longer than training, or than what an extension adds; extensions in another order than time."""
    warmup, ends = config.in_steps(config.optim.warmup), config.phase_ends
    problems = []
    if warmup > ends[0]:
        problems.append(f"optim.warmup: {warmup} steps; longer than training, which has {ends[0]} steps")
    dense = config.dense_steps or 0
    if dense >= ends[0]:
        problems.append(f"lowrank.dense_warmup: {dense} steps; training has {ends[0]}, and none would be left for low rank")
    if config.guided_steps >= ends[0]:
        left = f"training has {ends[0]}, and none would be left for the factors alone"
        problems.append(f"lowrank.self_guided: {config.guided_steps} steps; {left}")
    for start, end, (length, how) in zip(ends, ends[1:], config.extensions, strict=False):
        if end <= start:
            problems.append(f"extensions: {length} is step {start}; the run goes on from there only to step {end}")
        elif how == "restart" and warmup > end - start:
            problems.append(f"extensions: {end - start} steps from {length} on; shorter than optim.warmup, {warmup} steps")
    return problems


def _data_problems(config: Config) -> list[str]:
    """Data of the user's own that cannot be used."""
    try:
        _ = config.description
    except datasets.DataError as error:
        if str(error).startswith("dataset."):
            return str(error).splitlines()
        return [f"dataset.name: {first_line(error)}"]
    return []


def _length_problems(config: Config) -> list[str]:
    """Lengths that steps cannot count, and more batches for the initialisation than an epoch has."""
    problems, optim = [], config.optim
    if config.total_steps >= 2**31:
        problems.append(f"epochs: {config.epochs:g}; more than 2^31 steps")
    moments = {"optim.step_every": (optim.step_every,), "optim.step_at": optim.step_at}
    problems += [
        f"{key}: {moment}; more than 2^31 steps"
        for key, given in moments.items()
        for moment in given
        if config.in_steps(moment) >= 2**31
    ]
    at = [config.in_steps(moment) for moment in optim.step_at]
    if twice := [moment for place, moment in enumerate(optim.step_at) if at[place] in at[:place]]:
        problems.append(f"optim.step_at: {twice[0]}; the same step as another one, where the rate is multiplied once")
    epoch = -(-config.epoch_size // config.batch_size)
    if config.lowrank.moment_batches > epoch:
        problems.append(f"lowrank.moment_batches: {config.lowrank.moment_batches}; an epoch has {epoch} batches")
    return problems


def _evaluated_only(config: Config) -> list[str]:
    dataset, name = config.description, config.dataset.name
    if "train" in dataset.sizes:
        return []
    known = "" if name in datasets.NAMES else f"; it has no split train, only {', '.join(dataset.sizes)}"
    return [f"dataset.name: {name!r}; for evaluation only, as in lowrank evaluate --dataset={name}{known}"]


_CROPPING_KEYS = ("image_size", "crop_area", "eval_crop")


def _image_problems(config: Config) -> list[str]:
    """Settings that these images do not take."""
    dataset = config.description
    return [
        *_crop_problems(config, dataset),
        *_augmentation_problems(config.dataset, dataset),
        *_statistics_problems(config.dataset, dataset),
    ]


def _crop_problems(config: Config, dataset: datasets.Dataset) -> list[str]:
    """Settings of crops that are not for images of this kind."""
    given, name = config.dataset, config.dataset.name
    problems = []
    if not dataset.cropped:
        stored = f"{name} {_inputs(dataset)} and are not resized"
        keys = _CROPPING_KEYS if dataset.decoding else (*_CROPPING_KEYS, "max_undecodable")
        problems += [f"dataset.{key}: {getattr(given, key)!r}; {stored}; {_unset(key)}" for key in keys if _is_set(given, key)]
    elif given.crop_padding:
        cropped = f"{name} uses dataset.crop_area; {_unset('crop_padding')}"
        problems.append(f"dataset.crop_padding: {given.crop_padding}; {cropped}")
    if dataset.is_images and given.crop_padding >= min(dataset.image_shape[:2]):
        problems.append(
            f"dataset.crop_padding: {given.crop_padding}; must be less than the side of an image, or crops may miss it;"
            f" {name} {_inputs(dataset)}"
        )
    return problems


def _is_set(given: DatasetConfig, key: str) -> bool:
    """Whether a setting differs from its default."""
    return getattr(given, key) != getattr(DatasetConfig(), key)


def _unset(key: str) -> str:
    """What to do about a setting that does not apply; the config that is run need not be the user's own."""
    return f"set it to {getattr(DatasetConfig(), key)!r}"


def _inputs(dataset: datasets.Dataset) -> str:
    """What a data set holds, after its name."""
    if not dataset.is_images:
        return f"inputs are vectors of {dataset.image_shape[0]}"
    height, width, _ = dataset.image_shape
    return f"images are {height}x{width}"


_OF_IMAGES = ("flip", "crop_padding", "randaugment_layers", "random_erasing", "cutmix")


def _augmentation_problems(given: DatasetConfig, dataset: datasets.Dataset) -> list[str]:
    """Augmentations that make no sense of these inputs or labels."""
    name, layers = given.name, given.randaugment_layers
    if not dataset.is_images:
        wrong = [key for key in _OF_IMAGES if _is_set(given, key)]
        return [f"dataset.{key}: {getattr(given, key)!r}; {name} has vectors, no images; {_unset(key)}" for key in wrong]
    problems = []
    for field in _maps(dataset):
        moving = [key for key in ("flip", "crop_padding", "randaugment_layers") if _is_set(given, key)]
        problems += [f"dataset.{key}: {getattr(given, key)!r}; would move the image, but not its {field}" for key in moving]
        if dataset.cropped:
            problems.append(f"dataset.name: {name!r}; crops would move its images, but not their {field}; give all one size")
    if layers and dataset.image_dtype != "uint8":
        problems.append(
            f"dataset.randaugment_layers: {layers}; RandAugment needs uint8 images; {name} has {dataset.image_dtype}"
        )
    elif layers and dataset.image_shape[-1] != 3:
        channels = dataset.image_shape[-1]
        has = "is grey-scale" if channels == 1 else f"has {channels} channels"
        problems.append(f"dataset.randaugment_layers: {layers}; RandAugment needs RGB images; {name} {has}")
    return problems


def _maps(dataset: datasets.Dataset) -> list[str]:
    """The fields besides the image that have its height and width, so that they would have to move with it."""
    sides = dataset.image_shape[:2]
    return [
        name for name, field in dataset.fields.items() if name != "image" and len(field.shape) > 1 and field.shape[:2] == sides
    ]


def _statistics_problems(given: DatasetConfig, dataset: datasets.Dataset) -> list[str]:
    """Means and deviations that are not one for each channel."""
    needed = dataset.image_shape[-1]
    what = "channels" if dataset.is_images else "features"
    return [
        f"dataset.{key}: {len(values)} numbers; {given.name} has {needed} {what}"
        for key, values in (("mean", given.mean), ("std", given.std))
        if values is not None and len(values) != needed
    ]


def _overlaps(config: Config) -> list[str]:
    """A choice by examples that are trained on is biased; a result on examples that were chosen by is, too."""
    held_out = config.dataset.valid_split or ""
    return [
        f"dataset.valid_split: {held_out!r}; shares examples with dataset.{key}, {getattr(config.dataset, key)!r}"
        for key in ("train_split", "eval_split")
        if splits.share_examples(config.description, held_out, getattr(config.dataset, key))
    ]


def _model_problems(config: Config) -> list[str]:
    given, constructor = config.model, config.constructor
    problems = constructor.problems(given.kwargs, given.dtype)
    if problems:
        return problems
    types = constructor.types() or {}
    for key, value in given.kwargs.items():
        try:
            read_value(value, types.get(key, Any))
        except ValueError as error:
            problems.append(f"model.kwargs.{key}: {shown(value)}; must be {error}")
    return problems


def _plan_problems(config: Config) -> list[str]:
    try:
        check_plan(config)
    except ConfigError as error:
        return error.problems
    return []


def _mesh_rule_problems(config: Config, devices: int | None) -> list[str]:
    """Sharding rules that do not fit the network, or the mesh as far as it is known."""
    if not config.mesh.rules:
        return []
    rules, problems = read_rules(config.mesh.rules)
    sizes = config.mesh.sizes(devices) if devices else {axis: getattr(config.mesh, axis) for axis in AXES}
    known = {axis: size for axis, size in sizes.items() if size != -1}
    network = config.build_network()
    variables = jax.eval_shape(lambda images: network.init(jax.random.key(0), images), images_like(config))
    problems += rule_problems(rules, nn.meta.unbox(variables["params"]), known)
    return [f"mesh.rules: {problem}" for problem in problems]


def _mesh_problems(config: Config, devices: int) -> list[str]:
    axes = {axis: getattr(config.mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in axes.values() if size != -1)
    free = [axis for axis, size in axes.items() if size == -1]
    if len(free) > 1:
        return [f"mesh.{free[1]}: -1, but mesh.{free[0]} is -1 too; only one axis can take the remaining devices"]
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
        problems.append(
            f"optim.accumulate: {parts}; {config.batch_size} images on {shards} devices cannot be split into {parts} parts"
        )
    return problems
