"""Measures what each initialisation does to a network before training: function risk per kernel, logit error, seconds."""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import inputs
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import BudgetConfig, Config
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.pipeline import TrainBatches
from lowrank_jax.experiment.data.splits import split_size
from lowrank_jax.experiment.data.statistics import measured
from lowrank_jax.experiment.memory import beyond_machine
from lowrank_jax.experiment.training import start, state
from lowrank_jax.experiment.training.mixing import normalizer
from lowrank_jax.experiment.training.start import blank_images
from lowrank_jax.experiment.workdir.writer import duration
from lowrank_jax.linen.factorize import factorize, merge
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import Plan
from lowrank_jax.projection import linalg
from lowrank_jax.projection import matrix as projection
from lowrank_jax.projection.methods import METHODS
from lowrank_jax.text import did_you_mean

SCALES = (0.05, 0.1, 0.25)
COMPARED = (
    "spectral", "spectral_global_scale", "kernel_projection", "kernel_projection_search", "norm_preserving", "random_subspace",
)  # fmt: skip
IMAGES = ("noise", "data")
_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One method at one scale, on one random draw of the dense network.

    Attributes:
      method, scale, seed: which one.
      rank: by kernel name.
      risk: relative function risk by kernel name, in closed form: under Gaussian inputs, or under inputs with the captured
        second moments where the projection is data-aware.
      logit_error: |dense logits - low-rank logits|² / |dense logits|² over a batch of images, after subtracting each logit's
        mean over the batch.
      seconds: to factor all kernels with the compiled program; the minimum of up to three runs.
      compile_seconds: to compile that program.
    """

    method: str
    scale: float
    seed: int
    rank: dict[str, int]
    risk: dict[str, float]
    logit_error: float
    seconds: float
    compile_seconds: float

    @property
    def mean_risk(self) -> float:
        return statistics.fmean(self.risk.values())


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compare, besides the config.

    Attributes:
      scales, methods: every combination is measured.
      seeds: how many random draws of the network; the first one has the config's seed.
      images: the images that logits are computed on: `noise` (standard Gaussian) or `data` (the config's training images).
      batch_size: number of those images.
    """

    scales: tuple[float, ...] = SCALES
    methods: tuple[str, ...] = COMPARED
    seeds: int = 1
    images: str = "noise"
    batch_size: int = 16

    def problems(self, config: Config) -> list[str]:
        """What is wrong with these settings, one line per problem."""
        found = [f"--scales: {scale:g}; must be in (0, 1]" for scale in self.scales if not 0 < scale <= 1]
        for flag, values in (("--scales", self.scales), ("--methods", self.methods)):
            if len(set(values)) < len(values):
                found.append(f"{flag}: contains duplicates")
        found += [f"--methods: unknown {name!r}{did_you_mean(name, METHODS)}" for name in self.methods if name not in METHODS]
        if self.images not in IMAGES:
            found.append(f"--images: unknown {self.images!r}{did_you_mean(self.images, IMAGES)}")
        if self.batch_size < 2:
            found.append(f"--batch-size: {self.batch_size}; must be at least 2")
        if not 1 <= self.seeds <= _MOST_SEEDS:
            found.append(f"--seeds: {self.seeds}; must be from 1 to {_MOST_SEEDS}")
        pixels = 4 * math.prod(config.description.image_shape)  # float32
        found += [f"--batch-size: {problem}" for problem in beyond_machine("its images", self.batch_size * pixels)]
        if self.images == "data":
            available = split_size(config.description, config.dataset.train_split)
            needed = self.batch_size * (1 + config.lowrank.moment_batches)
            if needed > available:
                found.append(
                    f"--batch-size: {self.batch_size}; needs {needed} images in total, the training split has {available}"
                )
        return found

    def check(self, config: Config) -> None:
        """Raises ConfigError with all problems."""
        problems = self.problems(config)
        if problems:
            raise configs.ConfigError("init-report", problems)


def compare(config: Config, settings: Settings, *, say: Callable[[str], None] = lambda line: None) -> list[Measurement]:
    """Factors freshly drawn networks by every method at every scale, and measures the result.

    Args:
      config: gives the model, the data set and the rules; its method, scale and budget are replaced.
      settings: what to compare.
      say: called with lines of progress.

    Raises:
      ConfigError: the settings are not valid, or no kernel would be factored.
      DataError: the config's images are asked for and are missing.
    """
    settings.check(config)
    measured, programs = [], _Programs(config)
    plans = {
        (scale, method): programs.plan(method, scale) for scale, method in itertools.product(settings.scales, settings.methods)
    }
    total = settings.seeds * len(plans)
    say(
        f"{len(plans)} programs to compile, one for each scale and method, which serve all seeds and take most of the time;"
        " fewer by --scales and --methods"
    )
    clock = _Clock(total, len(set(plans.values())))
    if note := left_dense(next(iter(plans.values()))):
        say(note)
    for seed in range(config.seed, config.seed + settings.seeds):
        network = _Network(dataclasses.replace(config, seed=seed), settings, programs)
        for (scale, method), plan in plans.items():
            one = network.measure(method, scale, plan)
            measured.append(one)
            left = clock.left(one.compile_seconds if seed == config.seed else 0.0)
            say(
                f"[{len(measured)}/{total}] seed {seed}  scale {scale:g}  {method:24}  mean risk {one.mean_risk:.4f}"
                f"  logit error {one.logit_error:.4f}  {short_time(one.seconds)} s"
                f"  compiled in {one.compile_seconds:.1f} s  eta {duration(left)}"
            )
    return measured


def left_dense(plan: Plan) -> str:
    """Which kernels no measurement factors, as the ranks of their rules are not known before training; "" if there are none."""
    if not plan.waiting:
        return ""
    first, *others = [kernel.name for kernel in plan.waiting]
    more = f" and {len(others)} more" if others else ""
    return f"{first}{more}: dense here, by a rule with an energy, whose ranks are open until the dense warm-up ends"


def short_time(seconds: float) -> str:
    """12.34 -> 12.34, 0.001234 -> 0.0012."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.2g}"


class _Clock:
    """The time that measurements take: that of the programs still to be compiled, and of each measurement besides.

    Args:
      total: how many measurements there are.
      programs: how many programs they need.
    """

    def __init__(self, total: int, programs: int):
        self._total, self._programs = total, programs
        self._compiling: list[float] = []
        self._others: list[float] = []
        self._last = time.perf_counter()

    def left(self, compiling: float) -> float:
        """Seconds until the end, after one more measurement that compiled its program for so long; 0 for a known one."""
        now = time.perf_counter()
        self._others.append(now - self._last - compiling)
        self._last = now
        if compiling:
            self._compiling.append(compiling)
        more = (self._programs - len(self._compiling)) * statistics.fmean(self._compiling or [0.0])
        # The first measurements compile what all networks share, too.
        return more + (self._total - len(self._others)) * statistics.median(self._others)


@dataclasses.dataclass(frozen=True)
class _Factorizer:
    """A compiled `factorize`, `(params, key, moments) -> params`, and the seconds it took to compile."""

    run: Callable[..., Any]
    compile_seconds: float


class _Programs:
    """The programs, each compiled once for all seeds."""

    def __init__(self, config: Config):
        self._config, self.network = config, config.build_network()
        self.init = jax.jit(functools.partial(start.init_dense, self.network, blank_images(config.description)))
        self.forward = jax.jit(self._forward)
        self.merge = jax.jit(merge)
        self._factorizers: dict[Plan, _Factorizer] = {}

    def plan(self, method: str, scale: float) -> Plan:
        own = self._config.lowrank
        lowrank = dataclasses.replace(own, method=method, scale=scale, rank=None, budget=BudgetConfig(), dense_warmup=None)
        plan = configs.make_plan(dataclasses.replace(self._config, lowrank=lowrank))
        if not plan.factored:
            because = "; the ranks of energies are open before training" if plan.waiting else ""
            raise configs.ConfigError(
                "init-report", [f"at scale {scale:g} no kernel of this network would be factored{because}"]
            )
        return plan

    def factorizer(self, plan: Plan, *arguments: Any) -> _Factorizer:
        if plan not in self._factorizers:
            jitted = jax.jit(lambda params, key, moments: factorize(params, plan, key=key, moments=moments))
            begin = time.perf_counter()
            compiled = jitted.lower(*arguments).compile()
            self._factorizers[plan] = _Factorizer(compiled, time.perf_counter() - begin)
        return self._factorizers[plan]

    def _forward(self, variables: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        # BatchNorm has no useful running statistics before training: run the network as in its first training step.
        outputs, _ = self.network.step(variables, images, key)
        # Of several heads or maps, all numbers that there are for an example.
        leaves = [leaf.reshape(len(images), -1).astype(jnp.float32) for leaf in jax.tree.leaves(outputs)]
        logits = leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=1)
        return logits - logits.mean(axis=0)  # the mean is for the bias to learn, and would dominate the error


class _Network:
    """One random draw of the dense network, and the logits that its low-rank versions are compared with."""

    def __init__(self, config: Config, settings: Settings, programs: _Programs):
        self.config, self.programs = config, programs
        self.variables = programs.init(config.seed)
        self.dropout = state.key(config.seed, "dropout")
        self.images, *self.captured = _images(config, settings, 1 + config.lowrank.moment_batches)
        self.logits = programs.forward(self.variables, self.images, self.dropout)
        self._known_moments: dict[Any, dict[str, jax.Array]] = {}

    def measure(self, method: str, scale: float, plan: Plan) -> Measurement:
        params, moments = self.variables["params"], self._moments(plan)
        arguments = (params, state.key(self.config.seed, "factorize"), moments)
        factorizer = self.programs.factorizer(plan, *arguments)
        factored, seconds = _timed(lambda: factorizer.run(*arguments))
        merged = self.programs.merge(factored)  # runs in the dense network's program: nothing to compile per method
        logits = self.programs.forward({**self.variables, "params": merged}, self.images, self.dropout)
        error = jnp.sum((logits - self.logits) ** 2) / jnp.sum(self.logits**2)
        risks = relative_risks(params, merged, plan, moments)
        ranks = {kernel.name: kernel.rank for kernel in plan.captured}
        return Measurement(method, scale, self.config.seed, ranks, risks, float(error), seconds, factorizer.compile_seconds)

    def _moments(self, plan: Plan) -> dict[str, jax.Array] | None:
        if not self.captured:
            return None
        kernels = tuple((kernel.name, kernel.view) for kernel in plan.captured)  # independent of method and rank
        if kernels not in self._known_moments:
            self._known_moments[kernels] = inputs.second_moments(
                self.programs.network.module,
                self.variables,
                self.captured,
                plan,
                rngs={"dropout": self.dropout},
                **self.programs.network.flags(train=True),
            )
        return self._known_moments[kernels]


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Its result, and the minimum time of three runs (fewer once five seconds are used up)."""
    times: list[float] = []
    result = None
    while len(times) < 3 and sum(times) < 5:
        begin = time.perf_counter()
        result = jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return result, min(times)


def _images(config: Config, settings: Settings, batches: int) -> Iterator[jax.Array]:
    dataset = config.description
    if settings.images == "noise":
        for i in range(batches):
            shape = (settings.batch_size, *dataset.image_shape)
            yield jax.random.normal(state.key(config.seed, "init-report", i), shape)
        return
    arrays = datasets.load(dataset, config.dataset.train_split, config.dataset.data_dir)
    dataset = measured(dataset, arrays)
    source = TrainBatches(arrays, settings.batch_size, batches, config.seed)
    for i in range(batches):
        yield normalizer(dataset.mean, dataset.std)(jnp.asarray(source[i]["image"]))


def relative_risks(params: Any, merged: Any, plan: Plan, moments: dict[str, jax.Array] | None = None) -> dict[str, float]:
    """R(Y) / R(0) of every factored kernel by name, averaged over the layers of a stack.

    Args:
      params: the dense parameters.
      merged: the same tree with the low-rank kernels multiplied out.
      plan: says which kernels are factored.
      moments: second moments of the layers' inputs, `[..., n, n]` by kernel name; None for isotropic inputs.
    """
    before, after = named_leaves(params), named_leaves(merged)
    # Only what the risks depend on, without rank and method, so that one program serves all of them.
    judged = tuple((kernel.name, kernel.view, kernel.rule.activation) for kernel in plan.captured)
    names = [name for name, *_ in judged]
    risks = _risks(judged, {name: before[name] for name in names}, {name: after[name] for name in names}, moments)
    return {name: float(risk) for name, risk in risks.items()}


@functools.partial(jax.jit, static_argnums=0)
def _risks(judged: Any, before: dict[str, jax.Array], after: dict[str, jax.Array], moments: Any) -> dict[str, jax.Array]:
    def mean_risk(name: str, view: Any, activation: Any) -> jax.Array:
        w, y = (view.to_matrix(kernels[name]).reshape(-1, view.n, view.m) for kernels in (before, after))
        risk = functools.partial(projection.relative_risk, activation=activation, group=view.group)
        if moments is None:
            return jnp.mean(jax.lax.map(lambda pair: risk(*pair), (w, y)))

        def whitened(stack: Any) -> jax.Array:
            w, y, moment = stack
            root = linalg.square_root(moment)
            return risk(root @ w, root @ y)

        return jnp.mean(jax.lax.map(whitened, (w, y, moments[name].reshape(-1, view.n, view.n))))

    return {name: mean_risk(name, view, activation) for name, view, activation in judged}
