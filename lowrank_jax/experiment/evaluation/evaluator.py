"""Evaluates the checkpoints of runs: one, or those of many work directories."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import Config, MeshConfig
from lowrank_jax.experiment.config.trust import Trust, UntrustedCode
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import Dataset, Split
from lowrank_jax.experiment.errors import UserError, of_files
from lowrank_jax.experiment.evaluation import classes
from lowrank_jax.experiment.evaluation.against import Reference
from lowrank_jax.experiment.evaluation.classes import Classes
from lowrank_jax.experiment.evaluation.results import Evaluation, Rows
from lowrank_jax.experiment.evaluation.selection import default_split, other_dataset
from lowrank_jax.experiment.hosts.processes import several
from lowrank_jax.experiment.training import ranks, recorded_data
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.evaluate import Tally, evaluate
from lowrank_jax.experiment.training.fits import check_evaluation
from lowrank_jax.experiment.training.phases import Phases, phases_of
from lowrank_jax.experiment.training.state import evaluated_variables
from lowrank_jax.experiment.training.stored import evaluated_parts, read_config, restore
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints, Restored
from lowrank_jax.experiment.workdir.identity import digest_of, earlier_digests
from lowrank_jax.experiment.workdir.workdir import Workdir

_COMPARED = 64  # examples on each device at a time where networks are compared: the outputs of their layers are kept, twice


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run that is ready to be evaluated.

    Attributes:
      folder: its work directory.
      phases: with the run's networks, plans and data set; seed and optimiser may be another run's.
      eval_step: from `Experiment.jit_eval_step`.
      split, examples: what it is evaluated on; another data set's split is called "name/split".
      batch_size: over all devices; a multiple of their number.
      identity: the digest of the run's settings, which its checkpoints carry.
      earlier: the digests that those from before an extension carry; see `Checkpoints`.
      data_changed: what of the run's data has changed since it was trained.
    """

    folder: Workdir
    phases: Phases
    eval_step: Callable[..., dict[str, jax.Array]]
    split: str
    examples: Split
    batch_size: int
    identity: str
    earlier: tuple[str, ...]
    data_changed: tuple[str, ...] = ()

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder.checkpoints, self.identity, earlier=self.earlier, read_only=True)

    @property
    def experiment(self) -> Experiment:
        """The one that training ends with."""
        return self.phases.last

    def target(self, step: int) -> dict[str, Any]:
        """The parts of a step's state that evaluation needs."""
        return evaluated_parts(self.phases.at(step).shapes)

    def evaluate(
        self,
        restored: Restored,
        stop_requested: Callable[[], bool] = lambda: False,
        waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        reference: Reference | None = None,
    ) -> Evaluation:
        """Evaluates a checkpoint, and compares its network with another one's on the same batches.

        Raises:
          Interrupted: `stop_requested` became true before it had finished.
          ConfigError: the networks cannot be compared.
        """
        tallies: dict[str, Tally] = {}
        variables, plan = evaluated_variables(restored.state), self.phases.at(restored.step).plan
        eval_step, comparison = self.eval_step, None
        if reference is not None:
            comparison = reference.comparison(str(self.folder.path), self.experiment, plan)
            eval_step = comparison.beside(eval_step, variables[""])
        metrics = evaluate(
            eval_step,
            variables,
            self.examples,
            batch_size=self.batch_size,
            mesh=self.experiment.mesh,
            stop_requested=stop_requested,
            waiting=waiting,
            tallies=tallies,
        )
        names = classes.names_of(self.experiment.dataset)
        counted = {weights: Classes(names, **tally) for weights, tally in tallies.items() if tally}
        return Evaluation(
            self.split,
            restored.step,
            metrics[""],
            metrics.get("_raw"),
            plan.params,
            plan.dense_params,
            restored.damaged,
            counted.get(""),
            counted.get("_raw"),
            self.data_changed,
            comparison and comparison.fidelity(),
            comparison and comparison.against,
        )


class Evaluator:
    """Evaluates the checkpoints of any number of runs; the runs' own files are not changed.

    Runs of a sweep share work: a split is read once, a network is traced once for each plan, and the evaluation step is
    compiled once for each shape of its factors.

    Args:
      split: such as "test" or "train[:1000]"; None for each run's own `dataset.eval_split`, or another data set's only split.
      data_dir: where the data is; None for where it was in training.
      dataset: another data set of the same classes; None for each run's own.
      max_undecodable: maximum number of undecodable images; None for each run's own limit.
      trust_code: what a run's config may have imported besides this project's own models, losses and metrics: True for
        whatever it names, or the names to trust, such as "package.module:Model".
      classes: also count what each class is taken for, where labels are classes.
      against: also compare each network with that of another run: a work directory, with "@latest", "@best" or "@STEP" behind
        it or without.

    Attributes:
      untrusted: the names that runs were refused for.
    """

    def __init__(
        self,
        *,
        split: str | None = None,
        data_dir: str | None = None,
        dataset: str | None = None,
        max_undecodable: int | None = None,
        trust_code: Trust = False,
        classes: bool = False,
        against: str | None = None,
    ):
        self._split, self._data_dir, self._dataset, self._max_undecodable = split, data_dir, dataset, max_undecodable
        self._trusted, self._classes, self._against = trust_code, classes, against
        self.untrusted: dict[str, None] = {}
        self._phases: dict[Hashable, Phases] = {}
        self._eval_steps: dict[Hashable, Callable[..., dict[str, jax.Array]]] = {}
        self._splits: dict[Hashable, Split] = {}

    def evaluate(self, workdir: str, step: str = "latest") -> Evaluation:
        """Evaluates one checkpoint: `latest`, `best` or a number.

        Raises:
          WorkdirError, ConfigError, DataError, CheckpointError: something that is needed cannot be used; the message says why.
        """
        subject, reference = self.open(workdir), self.reference
        with subject.checkpoints() as checkpoints:
            restored = restore(checkpoints, step, subject.target)
        return subject.evaluate(restored, reference=reference)

    @functools.cached_property
    def reference(self) -> Reference | None:
        """The network that others are compared with; None without one.

        Raises:
          WorkdirError, ConfigError, CheckpointError: it cannot be read; the message says why.
          UntrustedCode: its config names code that is not trusted.
        """
        if self._against is None:
            return None
        with self._noting_untrusted():
            return Reference(self._against, self._trusted)

    def open(self, workdir: str) -> Subject:
        """Prepares the evaluation of a run.

        Raises:
          WorkdirError, ConfigError, DataError: its files or its data cannot be used.
          UntrustedCode: its config names code that is not trusted.
        """
        folder = Workdir(workdir)
        with recorded_data.used(folder):
            stored = self._config(folder)
            config = recorded_data.as_trained(stored, folder)
            if self._max_undecodable is not None:
                limited = dataclasses.replace(config.dataset, max_undecodable=self._max_undecodable)
                config = dataclasses.replace(config, dataset=limited)
            phases = self._phases_of(config, ranks.read(folder, stored), workdir)
            experiment = phases.last
            eval_step = self._eval_step(experiment)
        other, changed = self._data(config, folder, experiment.dataset)
        split = self._split or default_split(config, other)
        examples = self._read(other, split, self._data_dir or config.dataset.data_dir)
        name = split if other.name == config.dataset.name else f"{other.name}/{split}"
        devices = jax.device_count()
        each = -(-config.eval.batch_size // devices)
        batch_size = devices * (each if self._against is None else min(each, _COMPARED))
        check_evaluation(experiment, batch_size)
        identity, earlier = digest_of(stored), earlier_digests(stored)
        return Subject(folder, phases, eval_step, name, examples, batch_size, identity, earlier, changed)

    def _data(self, config: Config, folder: Workdir, trained_on: Dataset) -> tuple[Dataset, tuple[str, ...]]:
        """What to evaluate on, and what of it has changed since training."""
        if self._dataset is None or self._dataset == config.dataset.name:
            return recorded_data.looked_at(config, folder)
        return other_dataset(config, trained_on, self._dataset, self._data_dir), ()

    def _config(self, folder: Workdir) -> Config:
        with self._noting_untrusted():
            return read_config(folder, self._trusted, self._data_dir)

    @contextlib.contextmanager
    def _noting_untrusted(self) -> Iterator[None]:
        try:
            yield
        except UntrustedCode as error:
            self.untrusted |= dict.fromkeys(error.names)
            raise

    def _phases_of(self, config: Config, decided: ranks.Decided | None, workdir: str) -> Phases:
        first = config.dense_steps, config.guided_steps
        key = (_code(config), config.description, config.lowrank, config.optim.ema_decay is None, first, decided)
        if key not in self._phases:
            self._phases[key] = phases_of(dataclasses.replace(config, mesh=MeshConfig()), decided, workdir)
        return self._phases[key]

    def _eval_step(self, experiment: Experiment) -> Callable[..., dict[str, jax.Array]]:
        """One for all plans: jit distinguishes them by their kernels, which carry ranks and execution."""
        key = (_code(experiment.config), experiment.dataset)
        if key not in self._eval_steps:
            counted = classes.number_to_count(experiment.config, experiment.dataset) if self._classes else 0
            self._eval_steps[key] = experiment.jit_eval_step(classes=counted)
        return self._eval_steps[key]

    def _read(self, dataset: Dataset, split: str, data_dir: str | None) -> Split:
        key = (dataset, split, data_dir)
        if key not in self._splits:
            try:
                self._splits[key] = datasets.load(dataset, split, data_dir)
            except ValueError as error:
                raise configs.ConfigError("--split", [str(error)]) from None
        return self._splits[key]


def _code(config: Config) -> Hashable:
    """What decides which model and which objective a config names."""
    return config.model, config.objective, config.code_dir


def evaluate_all(
    workdirs: Sequence[str],
    evaluator: Evaluator,
    step: str,
    *,
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> dict[str, Evaluation]:
    """Evaluates a checkpoint of each work directory and prints a row for it; complains about those that cannot be evaluated."""
    rows, done = Rows(workdirs, say), {}
    _ = evaluator.reference  # what is wrong with it is said once
    for workdir in workdirs:
        try:
            done[workdir] = evaluator.evaluate(workdir, step)
        except (UserError, OSError) as error:
            if several():  # the other processes may be in the middle of it
                raise
            complain(complaint(workdir, error))
            continue
        for warning in done[workdir].warnings():
            complain(f"{workdir}: {warning}")
        rows.add(workdir, done[workdir])
    return done


def complaint(workdir: str, error: Exception) -> str:
    """What is wrong with a work directory, with its name once."""
    text = of_files(error) if isinstance(error, OSError) else str(error)
    return text if workdir in text else f"{workdir}: {text}"
