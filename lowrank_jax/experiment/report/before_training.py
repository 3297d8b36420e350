"""What each method makes of a network before training: every kernel's function risk, the logits' error, the seconds."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.pipeline import TrainBatches
from lowrank_jax.experiment.data.splits import split_size
from lowrank_jax.experiment.training import start, state
from lowrank_jax.experiment.training.mixing import normalizer
from lowrank_jax.experiment.training.start import blank_images
from lowrank_jax.experiment.workdir.writer import duration
from lowrank_jax.linen import inputs
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning import factorize as surgery
from lowrank_jax.planning.plans import Plan
from lowrank_jax.projection import linalg
from lowrank_jax.projection import matrix as projection
from lowrank_jax.projection.methods import METHODS
from lowrank_jax.text import did_you_mean, markdown_table

SCALES = (0.05, 0.1, 0.25)
COMPARED = (
    "spectral", "spectral_global_scale", "kernel_projection", "kernel_projection_search", "norm_preserving", "random_subspace",
)  # fmt: skip
IMAGES = ("noise", "data")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method at one scale on one draw of the dense network.

    Attributes:
      method, scale, seed: which.
      rank: by kernel name.
      risk: relative function risk by kernel name, by the closed form under Gaussian inputs (or, data-aware, under inputs of
        the captured second moments).
      logit_error: |dense logits - low-rank logits|² / |dense logits|² over a batch of images, less each logit's mean over it.
      seconds: to factor all kernels, compiled; the least of up to three runs.
      compile_seconds: to compile that.
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
      scales, methods: every combination is an arm.
      seeds: how often to draw the network anew, from the config's seed on.
      images: what the logits are computed from: `noise`, standard Gaussian, or `data`, the config's training images.
      batch_size: of those images.
    """

    scales: tuple[float, ...] = SCALES
    methods: tuple[str, ...] = COMPARED
    seeds: int = 1
    images: str = "noise"
    batch_size: int = 16

    def problems(self, config: Config) -> list[str]:
        """What is wrong with them, a line each."""
        found = [f"--scales: {scale:g}; must be in (0, 1]" for scale in self.scales if not 0 < scale <= 1]
        for flag, values in (("--scales", self.scales), ("--methods", self.methods)):
            if len(set(values)) < len(values):
                found.append(f"{flag}: names one of them twice")
        found += [f"--methods: unknown {name!r}{did_you_mean(name, METHODS)}" for name in self.methods if name not in METHODS]
        if self.images not in IMAGES:
            found.append(f"--images: unknown {self.images!r}{did_you_mean(self.images, IMAGES)}")
        if self.batch_size < 2:
            found.append(f"--batch-size: {self.batch_size}; must be at least 2, for logits to differ")
        if self.images == "data":
            there = split_size(config.description, config.dataset.train_split)
            needed = self.batch_size * (1 + config.lowrank.moment_batches)
            if needed > there:
                found.append(f"--batch-size: {self.batch_size}; needs {needed} images in all, the training split has {there}")
        return found

    def check(self, config: Config) -> None:
        """Raises ConfigError with all that is wrong with them."""
        problems = self.problems(config)
        if problems:
            raise configs.ConfigError("init-report", problems)


def compare(config: Config, settings: Settings, *, say: Callable[[str], None] = lambda line: None) -> list[Arm]:
    """Factors freshly drawn networks by every method at every scale, and measures.

    Args:
      config: its model, data set and rules; its own method and scale are replaced.
      settings: what to compare.
      say: takes lines of progress.

    Raises:
      ConfigError: the settings are not valid, or no kernel would be factored.
      DataError: the config's data is asked for and not there.
    """
    settings.check(config)
    arms, programs = [], _Programs(config)
    total = settings.seeds * len(settings.scales) * len(settings.methods)
    begin = time.perf_counter()
    for seed in range(config.seed, config.seed + settings.seeds):
        network = _Network(dataclasses.replace(config, seed=seed), settings, programs)
        for scale, method in itertools.product(settings.scales, settings.methods):
            arm = network.arm(method, scale)
            arms.append(arm)
            left = (time.perf_counter() - begin) / len(arms) * (total - len(arms))
            say(
                f"[{len(arms)}/{total}] seed {seed}  scale {scale:g}  {method:24}  mean risk {arm.mean_risk:.4f}"
                f"  logit error {arm.logit_error:.4f}  {arm.seconds:.2f} s  eta {duration(left)}"
            )
    return arms


@dataclasses.dataclass(frozen=True)
class _Factorizer:
    """A compiled `factorize` `(params, key, moments) -> params`, and how long that took."""

    run: Callable[..., Any]
    compile_seconds: float


class _Programs:
    """What is compiled once for all seeds."""

    def __init__(self, config: Config):
        self._config, self.model = config, config.build_model()
        self.init = jax.jit(functools.partial(start.init_dense, self.model, blank_images(config.description)))
        self.forward = jax.jit(self._forward)
        self.merge = jax.jit(surgery.merge)
        self._factorizers: dict[Plan, _Factorizer] = {}

    def plan(self, method: str, scale: float) -> Plan:
        lowrank = dataclasses.replace(self._config.lowrank, method=method, scale=scale, rank=None)
        plan = configs.make_plan(dataclasses.replace(self._config, lowrank=lowrank))
        if not plan.factored:
            raise configs.ConfigError("init-report", [f"at scale {scale:g} no kernel of this network would be factored"])
        return plan

    def factorizer(self, plan: Plan, *arguments: Any) -> _Factorizer:
        if plan not in self._factorizers:
            jitted = jax.jit(lambda params, key, moments: surgery.factorize(params, plan, key=key, moments=moments))
            begin = time.perf_counter()
            compiled = jitted.lower(*arguments).compile()
            self._factorizers[plan] = _Factorizer(compiled, time.perf_counter() - begin)
        return self._factorizers[plan]

    def _forward(self, variables: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        # BatchNorm's running statistics mean nothing before training: the network runs as it does in its first step.
        others = [name for name in variables if name != "params"]
        logits, _ = self.model.apply(variables, images, train=True, mutable=others, rngs={"dropout": key})
        return logits - logits.mean(axis=0)  # what all images share is the bias's to learn, and would drown the rest


class _Network:
    """A dense network as drawn, and what its low-rank versions are held against."""

    def __init__(self, config: Config, settings: Settings, programs: _Programs):
        self.config, self.programs = config, programs
        self.variables = programs.init(config.seed)
        self.dropout = state.key(config.seed, "dropout")
        self.images, *self.captured = _images(config, settings, 1 + config.lowrank.moment_batches)
        self.logits = programs.forward(self.variables, self.images, self.dropout)
        self._known_moments: dict[Any, dict[str, jax.Array]] = {}

    def arm(self, method: str, scale: float) -> Arm:
        params, plan = self.variables["params"], self.programs.plan(method, scale)
        moments = self._moments(plan)
        arguments = (params, state.key(self.config.seed, "factorize"), moments)
        factorizer = self.programs.factorizer(plan, *arguments)
        factored, seconds = _timed(lambda: factorizer.run(*arguments))
        merged = self.programs.merge(factored)  # the same function in the dense network's program, compiled once for all
        logits = self.programs.forward({**self.variables, "params": merged}, self.images, self.dropout)
        error = jnp.sum((logits - self.logits) ** 2) / jnp.sum(self.logits**2)
        risks = relative_risks(params, merged, plan, moments)
        ranks = {kernel.name: kernel.rank for kernel in plan.factored if kernel.rank is not None}
        return Arm(method, scale, self.config.seed, ranks, risks, float(error), seconds, factorizer.compile_seconds)

    def _moments(self, plan: Plan) -> dict[str, jax.Array] | None:
        if not self.captured:
            return None
        kernels = tuple((kernel.name, kernel.view) for kernel in plan.factored)  # whatever their method and rank
        if kernels not in self._known_moments:
            self._known_moments[kernels] = inputs.second_moments(
                self.programs.model, self.variables, self.captured, plan, rngs={"dropout": self.dropout}, train=True
            )
        return self._known_moments[kernels]


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the least time of three runs, or of those that begin within five seconds."""
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
    source = TrainBatches(arrays, settings.batch_size, batches, config.seed)
    for i in range(batches):
        yield normalizer(dataset.mean, dataset.std)(jnp.asarray(source[i]["image"]))


def relative_risks(params: Any, merged: Any, plan: Plan, moments: dict[str, jax.Array] | None = None) -> dict[str, float]:
    """R(Y) / R(0) of every factored kernel by name, averaged over the layers of a stack.

    Args:
      params: the dense parameters.
      merged: the same tree with low-rank kernels multiplied out.
      plan: which kernels those are.
      moments: second moments of the layers' inputs, if other than isotropic.
    """
    before, after = named_leaves(params), named_leaves(merged)
    # What the risks depend on; not the rank or the method, so that one program serves all of them.
    judged = tuple((kernel.name, kernel.view, kernel.rule.activation) for kernel in plan.factored if kernel.rule)
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


def summary(arms: Sequence[Arm]) -> list[list[str]]:
    """A row for every scale and method: means over the seeds, and from where to where they went."""
    header = ["scale", "method", "mean relative risk", "logit error", "seconds", "compile s"]
    rows = []
    for (scale, method), members in _by_scale_and_method(arms).items():
        rows.append([
            f"{scale:g}",
            method,
            _spread([arm.mean_risk for arm in members]),
            _spread([arm.logit_error for arm in members]),
            f"{statistics.median(arm.seconds for arm in members):.2f}",
            f"{statistics.median(arm.compile_seconds for arm in members):.1f}",
        ])  # fmt: skip
    return [header, *rows]


def kernel_table(arms: Sequence[Arm], scale: float, shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """A row for every kernel that is factored at a scale: its rank and each method's relative risk, means over the seeds."""
    by_method = {method: members for (at, method), members in _by_scale_and_method(arms).items() if at == scale}
    ranks = next(iter(by_method.values()))[0].rank
    rows = [["kernel", "shape", "rank", *by_method]]
    for name, rank in ranks.items():
        risks = [f"{statistics.fmean(arm.risk[name] for arm in members):.4f}" for members in by_method.values()]
        rows.append([name, "x".join(map(str, shapes[name])), str(rank), *risks])
    return rows


def _by_scale_and_method(arms: Sequence[Arm]) -> dict[tuple[float, str], list[Arm]]:
    groups: dict[tuple[float, str], list[Arm]] = {}
    for arm in arms:
        groups.setdefault((arm.scale, arm.method), []).append(arm)
    return groups


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def write(arms: Sequence[Arm], prefix: str, *, command: str, config: Config, settings: Settings) -> list[pathlib.Path]:
    """Writes the report as PREFIX.md, PREFIX.json and PREFIX.png, and returns their paths."""
    markdown, data, picture = (pathlib.Path(f"{prefix}.{suffix}") for suffix in ("md", "json", "png"))
    plan = configs.make_plan(config)
    shapes = {kernel.name: kernel.shape for kernel in plan.kernels}
    moments = config.lowrank.moment_batches
    lines = [
        f"# {config.model.name} before training",
        "",
        f"    {command}",
        "",
        f"{jax.device_count()} {jax.devices()[0].platform} device(s), {os.cpu_count()} cores, jax {jax.__version__}, float32. "
        + (
            f"Seeds {config.seed} to {config.seed + settings.seeds - 1}: means, and ranges over them."
            if settings.seeds > 1
            else f"Seed {config.seed}."
        ),
        "",
        "* *Mean relative risk*: R(Y)/R(0) of a kernel under "
        + (f"inputs of the second moments captured on {moments} batches" if moments else "Gaussian inputs")
        + ", by the closed form; the mean over the factored kernels.",
        f"* *Logit error*: |dense - low-rank logits|²/|dense logits|² on {settings.batch_size} images of {settings.images}, "
        "less each logit's mean over them; BatchNorm on batch statistics, as in the first step of training. A network that is "
        "the same for all images has 1, an unrelated network with logits of the same size 2.",
        "* *Seconds*: to factor all kernels, compiled, the least of up to three runs; *compile*: before that, once.",
        "",
        markdown_table(summary(arms)),
        "",
        f"![risk and logit error by scale]({picture.name})",
    ]
    for scale in settings.scales:
        lines += ["", f"## Relative risk of every kernel at scale {scale:g}", ""]
        lines.append(markdown_table(kernel_table(arms, scale, shapes)))
    stored = {"command": command, "arms": [dataclasses.asdict(arm) for arm in arms]}
    markdown.write_text("\n".join(lines) + "\n")
    data.write_text(json.dumps(stored, indent=1, allow_nan=False) + "\n")
    _plot(arms, picture, config.model.name)
    return [markdown, data, picture]


def _plot(arms: Sequence[Arm], path: pathlib.Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    measures = {"mean relative risk": lambda arm: arm.mean_risk, "logit error": lambda arm: arm.logit_error}
    groups = _by_scale_and_method(arms)
    for panel, (label, measure) in zip(panels, measures.items(), strict=True):
        for method in dict.fromkeys(arm.method for arm in arms):
            members = {scale: [measure(arm) for arm in group] for (scale, m), group in sorted(groups.items()) if m == method}
            means = [statistics.fmean(values) for values in members.values()]
            below = [mean - min(values) for mean, values in zip(means, members.values(), strict=True)]
            above = [max(values) - mean for mean, values in zip(means, members.values(), strict=True)]
            panel.errorbar(list(members), means, [below, above], marker="o", markersize=4, capsize=3, label=method)
        panel.set(xscale="log", xlabel="scale (rank / full rank)", ylabel=label)
        panel.set_xticks(sorted({arm.scale for arm in arms}), [f"{scale:g}" for scale in sorted({arm.scale for arm in arms})])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    errors = [arm.logit_error for arm in arms]
    if max(errors) > 10 * min(errors) > 0:
        panels[1].set(yscale="log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{title} before training")
    figure.savefig(path, dpi=120)
