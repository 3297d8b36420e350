"""Exact classification metrics over a whole split."""

import dataclasses
import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import Config, MeshConfig
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import Split
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.hosts.processes import several
from lowrank_jax.experiment.training.build import Experiment, build
from lowrank_jax.experiment.training.evaluate import evaluate
from lowrank_jax.experiment.training.state import evaluated_variables
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError, Checkpoints, Restored
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.text import align, count, did_you_mean


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

    def header(self) -> list[str]:
        return ["split", "examples", *self._shown(), "step", "params", "dense params"]

    def _shown(self) -> list[str]:
        """The objective's metrics by name, then its loss."""
        return [*(name for name in self.metrics if name not in ("loss", "examples", "undecodable")), "loss"]

    def rows(self) -> list[list[str]]:
        """Cells of a table; the raw weights have a row of their own where there are averaged ones."""
        if self.raw_metrics is None:
            return [self._row(self.split, self.metrics)]
        return [self._row(f"{self.split}, averaged", self.metrics), self._row(f"{self.split}, raw", self.raw_metrics)]

    def _row(self, split: str, metrics: dict[str, float]) -> list[str]:
        scores = [f"{metrics[name]:.4f}" for name in self._shown()]
        examples = f"{metrics['examples']:,}"
        return [split, examples, *scores, str(self.step), count(self.params), count(self.dense_params)]

    def warnings(self) -> list[str]:
        """A line for every damaged step, and one for images that could not be read."""
        lines = [f"checkpoint {step} is damaged ({reason})" for step, reason in self.damaged.items()]
        skipped = self.metrics.get("undecodable", 0)
        return lines + ([f"{skipped} of {skipped + self.metrics['examples']:,} images cannot be decoded"] if skipped else [])

    def table(self) -> str:
        """Aligned text: a header and a row."""
        return "\n".join([*self.warnings(), align([self.header(), *self.rows()])])

    def json(self) -> str:
        """One object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


class Rows:
    """A table said row by row, as evaluations end; where there are several work directories, they are its first column."""

    def __init__(self, workdirs: Sequence[str], say: Callable[[str], None]):
        self._named = len(workdirs) > 1
        self._least, self._widths = max(map(len, workdirs)), []
        self._say, self._header = say, []

    def add(self, workdir: str, evaluation: Evaluation) -> None:
        header = ["workdir", *evaluation.header()]
        repeated = header == self._header  # it is said once, and again where runs have other metrics
        if not repeated:
            self._header, self._widths = header, [self._least] + [0] * (len(header) - 1)
        table = [header, *([workdir, *row] for row in evaluation.rows())]
        self._widths = [max(map(len, column)) for column in zip(*table, [" " * width for width in self._widths], strict=True)]
        for cells in table[repeated:]:
            self._line(cells)

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
    experiment: Experiment
    eval_step: Callable[..., dict[str, jax.Array]]
    split: str
    examples: Split
    batch_size: int

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder.checkpoints, read_only=True)

    def target(self) -> dict[str, Any]:
        """The parts of the state that evaluation needs."""
        shapes = self.experiment.shapes
        optional = {"ema": shapes.ema, "collections": shapes.collections}
        kept = {name: part for name, part in optional.items() if part}
        return {"params": shapes.params, "batch_stats": shapes.batch_stats, **kept}

    def evaluate(self, restored: Restored, stop_requested: Callable[[], bool] = lambda: False) -> Evaluation:
        """Raises Interrupted if `stop_requested` becomes true on the way."""
        metrics = evaluate(
            self.eval_step,
            evaluated_variables(restored.state),
            self.examples,
            batch_size=self.batch_size,
            mesh=self.experiment.mesh,
            stop_requested=stop_requested,
        )
        plan = self.experiment.plan
        return Evaluation(
            self.split,
            restored.step,
            metrics[""],
            metrics.get("_raw"),
            plan.params,
            plan.dense_params,
            restored.damaged,
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
        self._experiments: dict[Hashable, Experiment] = {}
        self._eval_steps: dict[Hashable, Callable[..., dict[str, jax.Array]]] = {}
        self._splits: dict[Hashable, Split] = {}

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

    def _experiment(self, config: Config, workdir: str) -> Experiment:
        key = (config.model, config.description, config.lowrank, config.objective, config.optim.ema_decay is None)
        if key not in self._experiments:
            self._experiments[key] = build(dataclasses.replace(config, mesh=MeshConfig()), workdir)
        return self._experiments[key]

    def _eval_step(self, experiment: Experiment) -> Callable[..., dict[str, jax.Array]]:
        """One for all plans: jit tells them apart by the kernels, which hold their own ranks and schemes."""
        key = (experiment.config.model, experiment.config.objective, experiment.dataset)
        if key not in self._eval_steps:
            self._eval_steps[key] = experiment.jit_eval_step()
        return self._eval_steps[key]

    def _read(self, dataset: datasets.Dataset, split: str, data_dir: str | None) -> Split:
        key = (dataset, split, data_dir)
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
        except (UserError, OSError) as error:
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
