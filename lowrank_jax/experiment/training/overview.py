"""An experiment at a glance: which kernels are factored, and where every array lives."""

import math
from typing import Any

import jax
import numpy as np

from lowrank_jax.experiment.config.plan import forecast
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.hosts.sharding import bytes_per_device
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.phases import Phases, phases_of
from lowrank_jax.paths import named_leaves
from lowrank_jax.text import align, count


def overview(config: Config, devices: int, source: str = "config") -> str:
    """The plan's table, and what each of so many devices holds; nothing is computed, and no device is needed.

    Raises:
      ConfigError: the parts of the config do not fit together.
    """
    return describe_phases(phases_of(config, source=source, devices=devices))


def describe(experiment: Experiment) -> str:
    """See `overview`.  Arrays are listed one by one if the mesh shards parameters."""
    sizes, state = dict(experiment.mesh.shape), experiment.shapes
    parts = [str(experiment.plan)]
    if sizes["fsdp"] * sizes["model"] > 1:
        parts.append(align(_rows(state.params)))
    mesh = " x ".join(f"{name} {size}" for name, size in sizes.items())
    totals = [
        [f"mesh {mesh}", "per device", "total"],
        ["parameters", *_weights(state.params)],
        ["state: parameters, optimiser, statistics, averages", *_weights(state)],
    ]
    return "\n\n".join([*parts, align(totals)])


def describe_phases(phases: Phases) -> str:
    """What is described of each phase, in the order of time."""
    open_ = "" if phases.decided else forecast(phases.last.config)
    if phases.first is None:
        return f"{open_[:1].upper()}{open_[1:]}\n\n{describe(phases.last)}" if open_ else describe(phases.last)
    begin = "Self-guided training: each factor pair with a dense guide" if phases.guided else "Dense warm-up"
    after = f"After {f'step {phases.switch}' if phases.switch else 'the dense warm-up'}"
    after += f", {open_}" if open_ else ""
    return f"{begin}\n\n{describe(phases.first)}\n\n{after}\n\n{describe(phases.last)}"


def headline(phases: Phases) -> str:
    """A run in one line."""
    config = phases.last.config
    kind = "self-guided" if phases.guided else "dense"
    warmup = f" (the first {phases.switch or 'ones'} {kind})" if phases.first else ""
    guessed = " by a forecast" if config.is_imported and not phases.decided and forecast(config) else ""
    return (
        f"{config.model.name} on {config.dataset.name}: {sizes(phases.last)}{guessed};"
        f" {config.total_steps} steps{warmup} on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )


def sizes(experiment: Experiment) -> str:
    """How much of a network is factored, and what is left of its parameters."""
    config, plan = experiment.config, experiment.plan
    waiting = f" ({len(plan.waiting)} more have open ranks, and are dense here)" if plan.waiting else ""
    return (
        f"{len(plan.factored)} of {len(plan.kernels)} kernels factored by {config.lowrank.method}{waiting},"
        f" {count(plan.params)} of {count(plan.dense_params)} parameters"
    )


def extensions(experiment: Experiment) -> list[str]:
    """A line for each extension: from where to where, and how the learning rate goes on."""
    config = experiment.config
    schedule, ends = experiment.make_optimizer(config.peak_lr)[0], config.phase_ends
    lengths = [*(length for length, _ in config.extensions), config.length]
    lines = []
    for i, (length, how) in enumerate(config.extensions):
        rate = "the schedule anew" if how == "restart" else f"at a constant rate of {np.asarray(schedule(ends[i])):.3g}"
        lines.append(f"extended from {length} to {lengths[i + 1]}, steps {ends[i]} to {ends[i + 1]}: {rate}")
    return lines


def _rows(params: Any) -> list[list[str]]:
    """A row for every array that has several axes or is sharded, and one row for all others."""
    header = ["array", "shape", "sharded over", "part per device", "bytes"]
    shown, rest = [], 0
    for name, leaf in named_leaves(params).items():
        spec = leaf.sharding.spec
        if leaf.ndim < 2 and not any(spec):
            rest += bytes_per_device(leaf)
            continue
        part = leaf.sharding.shard_shape(leaf.shape)
        entries = (*spec, *[None] * (leaf.ndim - len(spec)))
        shown.append([name, _times(leaf.shape), ", ".join(map(_entry, entries)), _times(part), count(bytes_per_device(leaf))])
    return [header, *shown, *([["(others)", "", "whole", "", count(rest)]] if rest else [])]


def _entry(names: Any) -> str:
    return "-" if names is None else names if isinstance(names, str) else "*".join(names)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _weights(tree: Any) -> tuple[str, str]:
    """Bytes on one device, and bytes in all."""
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return count(bytes_per_device(tree)) + "B", count(whole) + "B"
