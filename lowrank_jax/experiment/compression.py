"""A trained network made low-rank at once: calibrated, factored, measured against itself, and left to be trained on."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lowrank_jax.comparison import Fidelity
from lowrank_jax.experiment.best import measured
from lowrank_jax.experiment.config.files import ConfigError, Overrides, keys_given, overridden
from lowrank_jax.experiment.config.schema import BUDGET_KINDS, Config, LowRankConfig
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.evaluation.against import NO_CLASSES, Against, Comparison, Watched
from lowrank_jax.experiment.evaluation.results import as_json
from lowrank_jax.experiment.hosts.sharding import batch_sharding, replicated
from lowrank_jax.experiment.objective import SOFTMAX
from lowrank_jax.experiment.training import weights
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.evaluate import evaluate
from lowrank_jax.experiment.training.loop import Loop, begin, opened
from lowrank_jax.experiment.training.result import finite_metrics
from lowrank_jax.planning.chips import CHIPS
from lowrank_jax.planning.execution import choose_execution, dense_seconds, seconds
from lowrank_jax.planning.plans import Plan
from lowrank_jax.projection.methods import TWO_SIDED
from lowrank_jax.text import align, count, with_change

RECORD = "compression.json"
_TIMED, _WORST = 5, 5
_CHIPS = ("v4", "v5e", "v6e", "h100")  # whose time is estimated
_BATCHES = 8  # of images, to measure the layers on


@dataclasses.dataclass(frozen=True)
class Compression:
    """What became of a network.

    Attributes:
      workdir: where the low-rank one is, as step 0.
      config: to train it on with.
      plan: its ranks.
      dense, low: the metrics of both on `dataset.eval_split`.
      fidelity: of the second to the first on the same images.
      expected_kl: what the second order says of the KL; None where ranks were chosen by something else.
      seconds: of the evaluation of a batch, dense and low-rank, as measured here.
      batch: how many images that is.
      estimated: by chip, a training step's time in all kernels over that in the dense ones, by the cost model of
        docs/mathematics.md, section 10.
    """

    workdir: str
    config: Config = dataclasses.field(repr=False)
    plan: Plan = dataclasses.field(repr=False)
    dense: dict[str, float]
    low: dict[str, float]
    fidelity: Fidelity
    expected_kl: float | None
    seconds: tuple[float, float]
    batch: int
    estimated: dict[str, float]

    def __str__(self) -> str:
        dense, low = self.seconds
        rows = [
            ["", "dense", "low rank"],
            ["parameters", count(self.plan.dense_params), with_change(self.plan.params, self.plan.dense_params)],
            ["MACs", count(self.plan.dense_macs), with_change(self.plan.macs, self.plan.dense_macs)],
            [f"ms for {self.batch:,} images, here", f"{1e3 * dense:.1f}", f"{1e3 * low:.1f} ({low / dense:.2f}x)"],
            *([name, f"{self.dense[name]:.4f}", f"{self.low[name]:.4f}"] for name in measured(self.low)),
            *([name, "", value] for name, value in self.fidelity.figures().items()),
        ]
        if self.estimated:
            ratios = ", ".join(f"{ratio:.2f}x on {chip}" for chip, ratio in self.estimated.items())
            rows.append(["kernels in a training step, estimated", "", ratios])
        if self.expected_kl is not None:
            rows.append(["KL, expected", "", f"{self.expected_kl:.4g}"])
        layers = self.fidelity.rows_of_layers(_WORST)
        return "\n\n".join([align(rows), *([align(layers)] if layers else [])])

    def record(self) -> dict[str, Any]:
        """The fields, for JSON; of the plan its totals."""
        return {
            "workdir": self.workdir,
            **{name: getattr(self.plan, name) for name in ("params", "dense_params", "macs", "dense_macs")},
            "dense": finite_metrics(self.dense),
            "low": finite_metrics(self.low),
            "fidelity": self.fidelity.record(),
            "expected_kl": self.expected_kl,
            "seconds": {"dense": self.seconds[0], "low": self.seconds[1], "batch": self.batch},
            "estimated": self.estimated,
        }

    def json(self) -> str:
        """A JSON object."""
        return as_json(self.record())


def with_defaults(config: str | ConfigDict, overrides: Overrides) -> list[tuple[str, Any]]:
    """The overrides of a config, and what compressing is best done with where neither they nor the config say otherwise.

    The config's own method is for training from scratch, and counts for nothing.

    Raises:
      ConfigError: the config cannot be read.
    """
    pairs = list(overrides if isinstance(overrides, Sequence) else overrides.items())
    given, usual = keys_given(pairs), LowRankConfig()
    low = _section(overridden(config, pairs), "lowrank")
    if "lowrank.method" in given and low.get("method") != TWO_SIDED:
        return pairs
    budget = _section(low, "budget")
    more: dict[str, Any] = {"lowrank.method": TWO_SIDED}
    if low.get("moment_batches", usual.moment_batches) == usual.moment_batches:
        more["lowrank.moment_batches"] = _BATCHES
    asked = any(budget.get(kind) is not None for kind in BUDGET_KINDS)
    if asked and budget.get("objective", usual.budget.objective) == usual.budget.objective:
        more["lowrank.budget.objective"] = "divergence"
    return [*pairs, *((key, value) for key, value in more.items() if key not in given)]


def _section(values: Any, name: str) -> Any:
    """A section of values that nobody has checked."""
    found = values.get(name)
    return found if isinstance(found, Mapping | ConfigDict) else {}


def compress(config: Config, workdir: str, *, source: str = "config", restart: bool = False) -> Compression:
    """Makes the network that `init.weights` names low-rank, measures what is lost, and saves it as step 0 of a run.

    Signals end it at once: until its end there is nothing to save.  Called again before the run is trained on, it measures the
    network that it left.

    Args:
      config: with `init.weights`.
      workdir, source, restart: as in `train`, which goes on from there.

    Raises:
      ConfigError, WorkdirError, DataError, CheckpointError: it cannot be done; the message says why.
      UserError: the run was trained on already.
    """
    if not config.is_imported or config.lowrank.method == "none":
        raise ConfigError(source, [_why_not(config)])
    with opened(config, workdir, source=source, restart=restart) as tools:
        loop = begin(tools, restart, trains=False)
        if loop.step:
            raise UserError(f"{workdir} was trained on, to step {loop.step}; lowrank evaluate says how good it is")
        return _measured(loop, workdir)


def _why_not(config: Config) -> str:
    if config.init.weights is None:
        return "init.weights: None; it names what is compressed: timm:NAME=FILE, a .safetensors file, a work directory"
    if config.lowrank.method == "none":
        return "lowrank.method: 'none'; that is the dense network"
    return "lowrank.dense_warmup: the network is compressed before it trains; set it to None"


def _measured(loop: Loop, workdir: str) -> Compression:
    """Evaluates both networks, and saves the low-rank one."""
    experiment, config, tools = loop.experiment, loop.config, loop.tools
    trained = weights.settle(tools.folder, config, tools.trained)
    dense = jax.device_put(trained.variables, replicated(experiment.mesh))
    low = loop.state.variables()[""]
    kernels = tuple(kernel.name for kernel in experiment.plan.factored)
    left_out = "" if config.objective.name == SOFTMAX else f"objective.name={config.objective.name}, so {NO_CLASSES}"
    watched = Watched.of(experiment, kernels, logits=not left_out)
    against = Against(config.init.weights or "", 0, left_out)
    comparison = Comparison(against, watched, dense, workdir, watched, kernels, {}, experiment.mesh)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("eval", "valid"):
        if kind in tools.data:
            step = comparison.beside(loop.eval_step, low) if kind == "eval" else loop.eval_step
            found[kind] = evaluate(
                step,
                {"dense": dense, "": low},
                tools.data[kind],
                batch_size=config.eval.batch_size,
                mesh=experiment.mesh,
                waiting=loop.waiting_for_data,
            )
    if loop.evaluated is None:
        loop.take({kind: parts[""] for kind, parts in found.items()})
    if loop.saved is None:
        loop.save()
        loop.checkpoints.wait()
    made = Compression(
        workdir,
        config,
        experiment.plan,
        found["eval"]["dense"],
        found["eval"][""],
        comparison.fidelity(),
        _expected(experiment.plan),
        _timed(experiment, dense, low),
        config.eval.batch_size,
        _estimated(experiment.plan, config),
    )
    loop.write_result(loop.evaluated or {})
    tools.folder.write_json(RECORD, made.record())
    return made


def _expected(plan: Plan) -> float | None:
    """What the loss gains to second order, of all kernels."""
    known = [kernel.divergence for kernel in plan.kernels if kernel.divergence is not None]
    return float(sum(known)) if known else None


def _estimated(plan: Plan, config: Config) -> dict[str, float]:
    """By chip, the time of all kernels in a training step over that of the dense ones."""
    how = {"batch": config.batch_size, "itemsize": jnp.dtype(config.model.dtype).itemsize}
    found = {}
    for name in _CHIPS:
        chip = CHIPS[name]
        chosen = choose_execution(plan, chip, **how)
        dense = {kernel.name: dense_seconds(kernel, chip, **how) for kernel in chosen.kernels}
        low = dense | {kernel.name: seconds(kernel, kernel.execution or "factored", chip, **how) for kernel in chosen.factored}
        if any(dense.values()):
            found[name] = sum(low.values()) / sum(dense.values())
    return found


def _timed(experiment: Experiment, *networks: Any) -> tuple[float, float]:
    """Seconds of a batch through each, in turns: the median of some."""
    dataset, size = experiment.dataset, experiment.config.eval.batch_size
    run = experiment.jit_forward()
    shape = (size, *dataset.image_shape)
    images = jax.device_put(np.zeros(shape, dataset.image_dtype), batch_sharding(experiment.mesh))
    times: list[list[float]] = [[] for _ in networks]
    for turn in range(_TIMED + 1):
        for network, found in zip(networks, times, strict=True):
            begun = time.perf_counter()
            jax.block_until_ready(run(network, images))
            if turn:  # the first one compiles
                found.append(time.perf_counter() - begun)
    dense, low = map(statistics.median, times)
    return dense, low
