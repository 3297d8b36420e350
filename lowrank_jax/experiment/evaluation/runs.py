"""Exact classification metrics over a whole split."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank_jax.experiment.config import parse as configs
from lowrank_jax.experiment.config.schema import Config, MeshConfig
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.datasets import DataError, Split
from lowrank_jax.experiment.data.pipeline import EvalBatches, shard_of
from lowrank_jax.experiment.hosts.processes import OtherFailed, several
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.hosts.votes import FAIL, STOP, Votes
from lowrank_jax.experiment.training import build as experiments
from lowrank_jax.experiment.training.state import evaluated_variables
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError, Checkpoints, Restored
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from lowrank_jax.planning.plans import align, count
from lowrank_jax.text import did_you_mean

UNUSABLE = (configs.ConfigError, WorkdirError, DataError, CheckpointError, OSError)
"""What may be wrong with one work directory while the others can be evaluated."""

_HEADER = ["split", "examples", "top1", "top5", "loss", "step", "params", "dense params"]


class Interrupted(Exception):
    """A stop was asked for."""


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    variables: dict[str, dict[str, Any]],
    examples: Split,
    *,
    batch_size: int,
    mesh: Mesh,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]]:
    """`top1`, `top5` and `loss` over every example once, whatever the batch size.

    `examples` says over how many, and `undecodable` how many images could not be read; it is left out where there are none.

    Args:
      eval_step: from `step.make_eval_step`.
      variables: sets of `params` and `batch_stats` by name, from `state.evaluated_variables`; all in one pass over the data.
      examples: what to evaluate on.
      batch_size: over all devices.
      mesh: the devices.
      stop_requested: is asked before every batch.

    Raises:
      DataError: more images do not decode than `dataset.max_undecodable` allows.
      Interrupted: `stop_requested` became true on the way, in this process or another.
      OtherFailed: another process could not read its part.
    """
    batches, votes = EvalBatches(examples, batch_size, shard_of(mesh)), Votes(mesh, stop_requested)
    reader, failure = iter(batches), None
    sums: list[dict[str, dict[str, jax.Array]]] = []
    for _ in range(len(batches)):
        if votes.outcome == STOP:
            raise Interrupted
        if votes.outcome == FAIL:
            break
        try:
            batch = batches.blank() if failure else next(reader)
        except DataError as error:
            if not votes.shared:
                raise
            batch, failure = batches.blank(), error  # the others count on this process until they know
        placed = votes.cast(put_batch(batch, mesh), failed=failure is not None)
        results = votes.count(*(eval_step(part["params"], part["batch_stats"], placed) for part in variables.values()))
        sums.append(dict(zip(variables, results, strict=True)))
        if len(sums) > 2:  # never far ahead of the devices
            jax.block_until_ready(sums[-3])
    if votes.settle() == FAIL:
        raise failure or OtherFailed
    parts = jax.device_get(sums)
    return {name: _means([part[name] for part in parts], examples, votes.shared) for name in variables}


def _means(sums: list[dict[str, Any]], examples: Split, shared: bool) -> dict[str, float]:
    """From the sums of every batch to means over what could be read."""
    # In float64 on the host: a float32 sum over 50,000 losses would lose digits.
    totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    seen = int(totals.pop("count"))
    skipped = len(examples) - seen
    # Other processes know of their own undecodable images only.
    known = len(examples.undecodable)
    assert skipped == known or (shared and skipped > known), f"evaluated {seen} of {len(examples)} examples"
    if not seen:
        raise DataError("none of the images that were to be evaluated decodes")
    means = {name: total / seen for name, total in totals.items()}
    return {**means, "examples": seen, **({"undecodable": skipped} if skipped else {})}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `lowrank evaluate` finds of a checkpoint.

    Attributes:
      split: what was evaluated.
      step: the checkpoint's.
      metrics: from `evaluate`; of the averaged weights where the run keeps any.
      raw_metrics: of the raw weights beside the averaged ones; None where there are no others.
      params, dense_params: of the network, and of its dense twin.
      damaged: newer steps that could not be used, each with the reason.
    """

    split: str
    step: int
    metrics: dict[str, float]
    raw_metrics: dict[str, float] | None
    params: int
    dense_params: int
    damaged: dict[int, str]

    def rows(self) -> list[list[str]]:
        """Cells of a table; the raw weights have a row of their own where there are averaged ones."""
        if self.raw_metrics is None:
            return [self._row(self.split, self.metrics)]
        return [self._row(f"{self.split}, averaged", self.metrics), self._row(f"{self.split}, raw", self.raw_metrics)]

    def _row(self, split: str, metrics: dict[str, float]) -> list[str]:
        scores = [f"{metrics[name]:.4f}" for name in ("top1", "top5", "loss")]
        examples = f"{metrics['examples']:,}"
        return [split, examples, *scores, str(self.step), count(self.params), count(self.dense_params)]

    def warnings(self) -> list[str]:
        """A line for every damaged step, and one for images that could not be read."""
        lines = [f"checkpoint {step} is damaged ({reason})" for step, reason in self.damaged.items()]
        skipped = self.metrics.get("undecodable", 0)
        return lines + ([f"{skipped} of {skipped + self.metrics['examples']:,} images did not decode"] if skipped else [])

    def table(self) -> str:
        """Aligned text: a header and a row."""
        return "\n".join([*self.warnings(), align([_HEADER, *self.rows()])])

    def json(self) -> str:
        """One object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


class Rows:
    """A table said row by row, as evaluations end; where there are several work directories, they are its first column."""

    def __init__(self, workdirs: Sequence[str], say: Callable[[str], None]):
        self._named = len(workdirs) > 1
        self._widths = [max(map(len, workdirs))] + [0] * len(_HEADER)
        self._say, self._begun = say, False

    def add(self, workdir: str, evaluation: Evaluation) -> None:
        table = [["workdir", *_HEADER], *([workdir, *row] for row in evaluation.rows())]
        self._widths = [max(map(len, column)) for column in zip(*table, [" " * width for width in self._widths], strict=True)]
        for cells in table[self._begun :]:  # the header once
            self._line(cells)
        self._begun = True

    def _line(self, cells: list[str]) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)]
        self._say("  ".join(padded if self._named else padded[1:]).rstrip())


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run whose checkpoints can be evaluated.

    Attributes:
      folder: the run's.
      experiment: one with the run's network, plan and data set; seed and optimiser may be another run's.
      eval_step: from `Experiment.jit_eval_step`.
      split, examples: what it is evaluated on; another data set's split is called "name/split".
      batch_size: how much at once; a multiple of the number of devices.
    """

    folder: Workdir
    experiment: experiments.Experiment
    eval_step: Callable[..., dict[str, jax.Array]]
    split: str
    examples: Split
    batch_size: int

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder.checkpoints, read_only=True)

    def target(self) -> dict[str, Any]:
        """The parts of the state that evaluation needs."""
        shapes = self.experiment.shapes
        return {"params": shapes.params, "batch_stats": shapes.batch_stats, **({"ema": shapes.ema} if shapes.ema else {})}

    def evaluate(self, restored: Restored, stop_requested: Callable[[], bool] = lambda: False) -> Evaluation:
        """Raises Interrupted if `stop_requested` becomes true on the way."""
        metrics = evaluate(
            self.eval_step,
            evaluated_variables({"ema": {}, **restored.state}),
            self.examples,
            batch_size=self.batch_size,
            mesh=self.experiment.mesh,
            stop_requested=stop_requested,
        )
        plan = self.experiment.plan
        return Evaluation(
            self.split, restored.step, metrics[""], metrics.get("_raw"), plan.params, plan.dense_params, restored.damaged
        )


class Evaluator:
    """Evaluates the checkpoints of any number of runs, whose own files are left as they are.

    What the runs of a sweep share is done once: a split is read once, a network traced once for every plan, and the evaluation
    step compiled once for every shape of its factors.

    Args:
      split: such as "test" or "train[:1000]"; None for each run's own `dataset.eval_split`, or another data set's only split.
      data_dir: where the data is; None for where it was in training.
      dataset: another data set of the same classes; None for each run's own.
      max_undecodable: so many images may turn out not to decode; None for each run's own limit.
    """

    def __init__(
        self,
        *,
        split: str | None = None,
        data_dir: str | None = None,
        dataset: str | None = None,
        max_undecodable: int | None = None,
    ):
        self._split, self._data_dir, self._dataset, self._max_undecodable = split, data_dir, dataset, max_undecodable
        self._experiments: dict[str, experiments.Experiment] = {}
        self._eval_steps: dict[str, Callable[..., dict[str, jax.Array]]] = {}
        self._splits: dict[tuple[str, str, str | None], Split] = {}

    def evaluate(self, workdir: str, step: str = "latest") -> Evaluation:
        """Evaluates one checkpoint: `latest`, `best` or a number.

        Raises:
          WorkdirError, ConfigError, DataError, CheckpointError: it cannot be done; the message says why.
        """
        subject = self.open(workdir)
        with subject.checkpoints() as checkpoints:
            restored = _restore(checkpoints, step, subject.target())
        return subject.evaluate(restored)

    def open(self, workdir: str) -> Subject:
        """Gets ready for the checkpoints of a run.  Raises WorkdirError, ConfigError or DataError if that cannot be."""
        folder = Workdir(workdir)
        config = configs.parse(folder.read_config(), source=f"{workdir}/config.json", devices=None)
        if self._max_undecodable is not None:
            limited = dataclasses.replace(config.dataset, max_undecodable=self._max_undecodable)
            config = dataclasses.replace(config, dataset=limited)
        experiment = self._experiment(config, workdir)
        other = _other(config, self._dataset) if self._dataset else config.description
        split = self._split or _default_split(config, other)
        examples = self._read(other, split, self._data_dir or config.dataset.data_dir)
        name = split if other.name == config.dataset.name else f"{other.name}/{split}"
        devices = jax.device_count()
        batch_size = -(-config.eval.batch_size // devices) * devices
        return Subject(folder, experiment, self._eval_step(experiment), name, examples, batch_size)

    def _experiment(self, config: Config, workdir: str) -> experiments.Experiment:
        key = repr((config.model, config.description, config.lowrank, config.optim.ema_decay is None))
        if key not in self._experiments:
            self._experiments[key] = experiments.build(dataclasses.replace(config, mesh=MeshConfig()), workdir)
        return self._experiments[key]

    def _eval_step(self, experiment: experiments.Experiment) -> Callable[..., dict[str, jax.Array]]:
        """One for all plans: jit tells them apart by the kernels, which hold their own ranks and schemes."""
        key = repr((experiment.config.model, experiment.dataset))
        if key not in self._eval_steps:
            self._eval_steps[key] = experiment.jit_eval_step()
        return self._eval_steps[key]

    def _read(self, dataset: datasets.Dataset, split: str, data_dir: str | None) -> Split:
        key = (repr(dataset), split, data_dir)
        if key not in self._splits:
            try:
                self._splits[key] = datasets.load(dataset, split, data_dir)
            except ValueError as error:
                raise configs.ConfigError("--split", [str(error)]) from None
        return self._splits[key]


def _other(config: Config, name: str) -> datasets.Dataset:
    """Another data set, as a run would read it.

    Raises:
      ConfigError: there is none of that name, or the run's network does not fit it.
    """
    if name not in datasets.NAMES:
        raise configs.ConfigError("--dataset", [f"unknown {name!r}{did_you_mean(name, datasets.NAMES)}"])
    if name == config.dataset.name:
        return config.description
    ours, size = config.description, config.description.image_shape[0]
    other = datasets.describe(name, {}, image_size=size, decoding=config.decoding)
    if (other.classes, other.image_shape) != (ours.classes, ours.image_shape):
        raise configs.ConfigError(
            "--dataset", [f"{name} has {_kind(other)}; the run was trained on {ours.name}, {_kind(ours)}"]
        )
    return other


def _kind(dataset: datasets.Dataset) -> str:
    height, width, channels = dataset.image_shape
    return f"{height}x{width}x{channels} images of {dataset.num_classes} classes ({dataset.classes})"


def _default_split(config: Config, dataset: datasets.Dataset) -> str:
    if dataset.name == config.dataset.name:
        return config.dataset.eval_split
    if len(dataset.sizes) > 1:
        raise configs.ConfigError("--split", [f"say which split of {dataset.name}: {', '.join(dataset.sizes)}"])
    return next(iter(dataset.sizes))


def evaluate_all(
    workdirs: Sequence[str],
    evaluator: Evaluator,
    step: str,
    *,
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> dict[str, Evaluation]:
    """Evaluates a checkpoint of every work directory that has one, with a row as each is done; complains of the others."""
    rows, done = Rows(workdirs, say), {}
    for workdir in workdirs:
        try:
            done[workdir] = evaluator.evaluate(workdir, step)
        except UNUSABLE as error:
            if several():  # the others may be in the middle of it
                raise
            complain(complaint(workdir, error))
            continue
        for warning in done[workdir].warnings():
            complain(f"{workdir}: {warning}")
        rows.add(workdir, done[workdir])
    return done


def complaint(workdir: str, error: Exception) -> str:
    """What is wrong with a work directory, which is named once."""
    text = f"{error.filename or 'input or output'}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
    return text if workdir in text else f"{workdir}: {text}"


def _restore(checkpoints: Checkpoints, step: str, target: Any) -> Restored:
    if step == "latest":
        restored = checkpoints.restore(target)
        if restored is None:
            raise CheckpointError(f"{checkpoints.directory} has no checkpoints yet")
        return restored
    chosen = _choose(checkpoints, step)
    restored = checkpoints.restore_step(chosen, target)
    if restored is None:
        raise CheckpointError(f"{checkpoints.directory}: step {chosen} was deleted by its run while it was read")
    return restored


def _choose(checkpoints: Checkpoints, step: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.directory} has no checkpoints yet")
    if step == "best":
        best = checkpoints.best()
        if best is None:
            raise CheckpointError(f"{checkpoints.directory}: no checkpoint was evaluated, so none is best; there are {steps}")
        return best
    if not (step.isascii() and step.isdecimal()) or int(step) not in steps:
        raise CheckpointError(f"{checkpoints.directory} has no step {step}; there are {steps} (or say latest, best)")
    return int(step)
