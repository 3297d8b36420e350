"""What a run leaves at its end: in Python, and in result.json."""

import dataclasses
import math
import platform
from importlib import metadata
from typing import Any

from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.evaluate import Evaluated
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.workdir.identity import digest_of
from lowrank_jax.experiment.workdir.metrics import Digest


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
      state: the final state.
      train: the training metrics as logged, by step.
      evals: the evaluations of this process on `dataset.eval_split`, by step.
      interrupted: it was stopped and saved before its end.
    """

    state: TrainState
    train: dict[int, dict[str, float]]
    evals: dict[int, dict[str, float]]
    interrupted: bool


def result_record(
    experiment: Experiment,
    *,
    step: int,
    dense_steps: int,
    evaluated: Evaluated,
    best_step: int | None,
    seconds: float,
    metrics: Digest,
) -> dict[str, Any]:
    """The contents of result.json."""
    plan = experiment.plan
    return {
        "step": step,
        "phases": _phases(experiment.config),
        "dense_steps": dense_steps,  # of the warm-up
        "guided_steps": experiment.config.guided_steps,
        "params": plan.params,
        "dense_params": plan.dense_params,
        "macs": plan.macs,
        "dense_macs": plan.dense_macs,
        **{kind: finite_metrics(evaluated.get(kind)) for kind in ("eval", "valid", "eval_raw", "valid_raw")},
        "best_step": best_step,
        "seconds": seconds,
        "versions": _versions(),
        "config_digest": digest_of(experiment.config),
        "metrics": metrics,
    }


def _phases(config: Config) -> list[dict[str, Any]]:
    """The lengths that training had, each with its last step and its schedule: one, and one for each extension."""
    lengths = [*(length for length, _ in config.extensions), config.length]
    schedules = [config.optim.schedule, *(how for _, how in config.extensions)]
    return [
        {"length": str(length), "step": end, "schedule": schedule}
        for length, end, schedule in zip(lengths, config.phase_ends, schedules, strict=True)
    ]


def finite_metrics(metrics: dict[str, float] | None) -> dict[str, float | None] | None:
    """None for metrics of your own that are not finite: JSON has no other word for them."""
    if metrics is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _versions() -> dict[str, str]:
    packages = ("lowrank_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
