"""The training loop, top to bottom as a run happens."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.best import measured
from lowrank_jax.experiment.config.files import ConfigError, to_dict
from lowrank_jax.experiment.config.plan import make_plan
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.pipeline import Feed, TrainBatches, shard_of
from lowrank_jax.experiment.duration import Duration
from lowrank_jax.experiment.hosts.processes import OtherFailed, barrier, exchange
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.hosts.votes import FAIL, GO_ON, LAG, Votes
from lowrank_jax.experiment.training import imported, ranks, recorded_data, weights
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.class_weights import with_class_weights
from lowrank_jax.experiment.training.evaluate import NOBODY, Evaluated, Interrupted, evaluate, score
from lowrank_jax.experiment.training.extend import extended
from lowrank_jax.experiment.training.fits import check_training
from lowrank_jax.experiment.training.log_window import Diverged, Window
from lowrank_jax.experiment.training.overview import describe_phases, extensions, headline, sizes
from lowrank_jax.experiment.training.phases import Phases, phases_of
from lowrank_jax.experiment.training.profiler import StepProfiler
from lowrank_jax.experiment.training.result import TrainResult, result_record
from lowrank_jax.experiment.training.resume import Resumed, first_batches, jax_settings, restore
from lowrank_jax.experiment.training.stable_ranks import StableRanks
from lowrank_jax.experiment.training.stop import Stalled, StopSignal
from lowrank_jax.experiment.training.switch import decided_after, switched, unguided
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.identity import digest_of, earlier_digests, flatten
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from lowrank_jax.experiment.workdir.writer import Writer, duration, progress_line

OnEvaluation = Callable[[int, Evaluated], None]


def train(
    config: Config,
    workdir: str,
    *,
    source: str = "config",
    restart: bool = False,
    extend: bool = False,
    schedule: str | None = None,
    stop: StopSignal | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> TrainResult:
    """Trains until the end or until stopped; called again on the same work directory, it resumes exactly.

    Where a run has several processes, all of them call this; they stop together, whichever of them is asked to.

    Args:
      config: the experiment.
      workdir: its folder, local or remote.
      source: what to call the config in messages.
      restart: begin anew if the run was saved and its checkpoints are gone.
      extend: make a run in this work directory longer; see `extend`.
      schedule: how its learning rate goes on; see `extend`.
      stop: what requests a stop, for callers that do not rely on signals; by default SIGTERM and Ctrl-C do.
      on_evaluation: called after every evaluation with the step and the metrics, once they are written.

    Raises:
      ConfigError, TooLarge, WorkdirError, DataError, CheckpointError: it cannot start; the message says why.
      Diverged: the loss, or the gradient, is not finite.
      OtherFailed: another process of the run cannot.
    """
    if extend:
        config = extended(config, workdir, schedule, source)
    elif schedule:
        raise ConfigError("--schedule", ["it says how the learning rate of a longer run goes on; add --extend"])
    with opened(config, workdir, source=source, restart=restart, stop=stop, on_evaluation=on_evaluation) as tools:
        loop = begin(tools, restart)
        with tools.stop:  # until now there was nothing to save
            return loop.run()


@contextlib.contextmanager
def opened(
    config: Config,
    workdir: str,
    *,
    source: str = "config",
    restart: bool = False,
    stop: StopSignal | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Iterator["Tools"]:
    """What a run works with, in its work directory, where nobody else trains meanwhile; arguments and errors as in `train`."""
    stop = stop or StopSignal()
    folder = _checked(workdir, config)
    phases = phases_of(config, ranks.settle(folder, config, restart=restart), source)
    for experiment in phases.all:
        check_training(experiment)
    trained = weights.before_the_first_step(folder, config)
    with stop.waiting_for_data(saved=False):
        data = _load(phases.last)
    with folder.locked():
        _claim(folder, config)
        phases = _as_decided(phases, folder, config, source, restart)
        folder.forget_failure()
        folder.set_earlier_result_aside(earlier_digests(config))
        folder.write_text("overview.txt", f"{describe_phases(phases)}\n")
        experiment = phases.last
        with Writer(folder, board=config.log.tensorboard) as writer, _checkpoints(folder, config) as checkpoints:
            writer.say(headline(phases))
            for line in extensions(experiment):
                writer.say(line)
            for note in experiment.dataset.notes:
                writer.say(f"{experiment.dataset.name}: {note}")
            with stop.waiting_for_data(saved=False):
                dataset = weights.with_pixels(config, experiment.dataset, writer.say)
                dataset = recorded_data.settle(folder, config, dataset, data["train"], writer.say)
            phases = phases.map(lambda each: dataclasses.replace(each, dataset=dataset))
            writer.show_settings(flatten(to_dict(config)))
            with stop.waiting_for_data(saved=False):
                phases = with_class_weights(phases, data["train"])
            if found := phases.last.class_weights:
                writer.say(f"class weights, by frequency: {', '.join(f'{weight:.4g}' for weight in found)}")
            try:
                yield Tools(phases, data, folder, writer, checkpoints, stop, on_evaluation, trained)
            except Diverged as error:
                folder.note_failure(diverged=True, reason=str(error))
                checkpoints.wait()  # all processes come here, and what the message calls the last good one is on its way
                raise


def _as_decided(phases: Phases, folder: Workdir, config: Config, source: str, restart: bool) -> Phases:
    """The phases with the ranks that a process which held the lock until now may have decided."""
    decided = ranks.settle(folder, config, restart=restart)
    return phases if decided == phases.decided else phases_of(config, decided, source)


def _load(experiment: Experiment) -> dict[str, datasets.Split]:
    """The splits `train`, `eval` and, where there is one, `valid`."""
    given = experiment.config.dataset
    splits = {"train": given.train_split, "eval": given.eval_split, "valid": given.valid_split}
    return {kind: datasets.load(experiment.dataset, split, given.data_dir) for kind, split in splits.items() if split}


def _checked(workdir: str, config: Config) -> Workdir:
    """The work directory, if it can be this experiment's.

    Raises:
      WorkdirError: it is another's, or the processes have different settings.
    """
    folder = Workdir(workdir, active=jax.process_index() == 0)
    _agree(to_dict(config))
    folder.check(to_dict(config), _earlier(config))
    if not (folder.path / "config.json").exists():  # its checkpoints alone can tell whose it is
        with Checkpoints(folder.checkpoints, digest_of(config), earlier=earlier_digests(config), read_only=True) as checkpoints:
            checkpoints.check_experiment()
    return folder


def _claim(folder: Workdir, config: Config) -> None:
    """Writes the config; no process goes on before the folder is known to be the same for all.

    Raises:
      WorkdirError: it has become another's, or cannot be written, or the processes have different folders.
    """
    folder.claim(to_dict(config), _earlier(config))
    barrier()
    folder.check_shared()


def _earlier(config: Config) -> list[dict[str, Any]]:
    return [to_dict(earlier) for earlier in config.earlier()]


def _checkpoints(folder: Workdir, config: Config) -> Checkpoints:
    return Checkpoints(
        folder.checkpoints,
        digest_of(config),
        earlier=earlier_digests(config),
        keep=config.checkpoint.keep,
        confirmed=folder.note_saved,
    )


def _agree(config: dict[str, Any]) -> None:
    """Raises WorkdirError unless all processes have the same settings."""
    ours = {key: value for key, value in flatten(config).items() if key not in ("code_dir", "dataset.data_dir")}
    first, *others = [json.loads(text) for text in exchange(json.dumps(ours))]
    for process, theirs in enumerate(others, start=1):
        different = [f"{key} is {theirs.get(key)}, not {first[key]}" for key in first if theirs.get(key) != first[key]]
        if different:
            raise WorkdirError(f"process {process} was given other settings than process 0: {'; '.join(different)}")


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a run works with from its beginning to its end; `trained` are the weights that it begins with, if it has not yet."""

    phases: Phases
    data: dict[str, datasets.Split]
    folder: Workdir
    writer: Writer
    checkpoints: Checkpoints
    stop: StopSignal
    on_evaluation: OnEvaluation | None = None
    trained: weights.Trained | None = None


def begin(tools: Tools, restart: bool = False, *, trains: bool = True) -> "Loop":
    """Restores or starts the run, and compiles its training step if it `trains`; `restart` as in `train`."""
    began = time.perf_counter()
    config, mesh = tools.phases.last.config, tools.phases.last.mesh
    batches = TrainBatches(
        tools.data["train"],
        config.batch_size,
        config.total_steps,
        config.seed,
        config.dataset.to_augmentation(),
        shard_of(mesh),
    )
    resumed = restore(tools.phases, tools.checkpoints, tools.folder, tools.writer.say, restart=restart)
    if resumed is None:
        tools, resumed = _started(tools, batches)
    phases = tools.phases
    if phases.decided:
        ranks.write(tools.folder, config, phases.decided)
    if trains and resumed.step < config.total_steps:
        tools.folder.set_unfinished_result_aside(config.total_steps)
    steps_left = trains and resumed.step < config.total_steps and not phases.ends(resumed.step)
    train_step = _compiled(phases.at(resumed.step), tools.writer) if steps_left else None
    return Loop(tools, batches, resumed, train_step, began - resumed.seconds)


def _started(tools: Tools, batches: TrainBatches) -> tuple[Tools, Resumed]:
    """The run before its first step; its ranks may go by the weights that it begins with."""
    phases, folder, say = tools.phases, tools.folder, tools.writer.say
    config = phases.last.config
    count = 0 if config.starts_dense else config.lowrank.moment_batches

    def first() -> Iterator[dict[str, jax.Array]]:
        return first_batches(batches, phases.last.mesh, count, say, lambda: tools.stop.waiting_for_data(saved=False))

    if config.init.weights is None:
        return tools, Resumed(phases.at(0).init(first))
    phases, state = imported.first_state(phases, weights.settle(folder, config, tools.trained), first, say)
    folder.write_text("overview.txt", f"{describe_phases(phases)}\n")
    return dataclasses.replace(tools, phases=phases), Resumed(state)


def _compiled(experiment: Experiment, writer: Writer) -> Callable[..., Any]:
    writer.say("compiling the training step ...")
    begin = time.perf_counter()
    train_step = experiment.compile_train_step()
    writer.say(f"compiled in {duration(time.perf_counter() - begin)}")
    return train_step


class Loop:
    """The loop; `run` is the order in which things happen.

    Args:
      tools: of the run.
      batches: of the training data.
      resumed: where the run is taken up.
      train_step: from `Experiment.compile_train_step`; None if no step is left, in this phase, or none is taken.
      began: the time at which the run would have begun, had one process done all of it.
    """

    def __init__(
        self, tools: Tools, batches: TrainBatches, resumed: Resumed, train_step: Callable[..., Any] | None, began: float
    ):
        experiment = tools.phases.at(resumed.step)
        config = experiment.config
        self.tools, self.config, self.objective, self.batches = tools, config, experiment.objective, batches
        self.phases, self.experiment = tools.phases, experiment
        self.writer, self.checkpoints = tools.writer, tools.checkpoints
        self.train_step, self.eval_step = train_step, experiment.jit_eval_step()
        self.began, self.total = began, config.total_steps
        self.eval_every = max(1, config.in_steps(config.eval.every))
        self.save_every = max(1, config.in_steps(config.checkpoint.every))
        self.log_every = max(1, config.in_steps(config.log.every))
        self.votes = Votes(experiment.mesh, lambda: tools.stop.requested)
        # The others hear of a batch that cannot be read while there still are batches for the steps until then.
        self.feed = Feed(batches, ahead=LAG + 1 if self.votes.shared else 0)
        if resumed.data is not None:
            self.feed.set_state(resumed.data)
        self.state, self.step, self.saved, self.evaluated = resumed.state, resumed.step, resumed.saved, resumed.evaluated
        epoch = config.in_steps(Duration(1, "epoch"))
        # Of the ranks by which a warm-up ends, also where it is gone through again with others that were decided.
        watched = make_plan(config) if self.looks_at_stable_ranks() else experiment.plan
        self.stable_ranks = StableRanks(watched, epoch, config.latest_switch, resumed.stable_ranks)
        self.improved = False  # by the evaluation of the state at hand
        self.interrupted = False  # in an evaluation, or while data did not come
        self.logged: dict[int, dict[str, float]] = {}
        self.evals: dict[int, dict[str, float]] = {}
        self.window = Window(config.batch_size, self.step, list(resumed.window))  # its clock starts here
        self.profiler = StepProfiler(
            config.profile.steps,
            tools.folder.path,
            state=lambda: self.state,
            paused=self.window.paused,
            say=self.writer.say,
        )

    def run(self) -> TrainResult:
        try:
            with self.profiler:
                self.advance_to_the_end()
        except (datasets.DataError, OtherFailed):
            self.save_before_giving_up()
            raise
        return self.finish()

    def advance_to_the_end(self) -> None:
        with self.until_stopped(), self.waiting_for_data():
            self.feed.fill()
        if any(exchange("failed" if self.feed.error else "")):
            raise self.feed.error or OtherFailed
        while True:
            with self.window.paused():
                self.checkpoints.confirm()  # as soon as a save is on disk, it is said to be
                self.evaluate_if_due()  # the state as it is, before it changes
                self.look_at_stable_ranks()
                self.save_if_due()  # before the iterator moves on
            if self.step == self.total or self.stopping():
                break
            with self.until_stopped():
                with self.window.paused():
                    self.switch_if_due()
                self.advance()
                self.log_if_due()
        if self.votes.outcome == FAIL:
            raise self.feed.error or OtherFailed

    @contextlib.contextmanager
    def until_stopped(self) -> Iterator[None]:
        """What is left undone where a stop is asked for; the state is sound."""
        try:
            yield
        except Interrupted:
            self.interrupted = True
        except Stalled:
            if self.votes.shared:  # the others wait for what this process reads
                raise
            self.interrupted = True

    def looks_at_stable_ranks(self) -> bool:
        """Whether this step is of a warm-up that ends of its own accord."""
        return self.config.dense_steps is None and self.phases.at(self.step) is self.phases.first

    def look_at_stable_ranks(self) -> None:
        """Ends a warm-up of its own accord once they settle, unless its end was decided before."""
        if not self.looks_at_stable_ranks():
            return
        seen = self.stable_ranks.look(self.step, self.state.params)
        if seen:
            self.writer.write(self.step, {f"stable_rank/{name}": value for name, value in seen.items()})
        if self.phases.switch is None and self.stable_ranks.settled(self.step):
            self.phases = dataclasses.replace(self.phases, switch=self.step)

    def switches(self) -> bool:
        """Whether the first phase ends with this step."""
        return self.phases.ends(self.step)

    def switch_if_due(self) -> None:
        """From the first phase to the last one; this step's checkpoint is of the first."""
        if not self.switches():
            return
        if self.phases.guided:
            self.drop_guides()
        else:
            self.factor()
        self.train_step = _compiled(self.experiment, self.writer)

    def drop_guides(self) -> None:
        self.writer.say(f"step {self.step}: self-guided training ends; the factors go on alone")
        self.experiment = self.phases.last
        self.state = unguided(self.experiment, self.state)
        self.eval_step = self.experiment.jit_eval_step()

    def factor(self) -> None:
        begin = time.perf_counter()
        self.writer.say(f"step {self.step}: the dense warm-up ends; factoring the network ...")
        phases = decided_after(self.phases, self.state, self.first_batches, self.step)
        if phases.decided:
            ranks.write(self.tools.folder, self.config, phases.decided)
        self.tools.folder.write_text("overview.txt", f"{describe_phases(phases)}\n")
        state = switched(phases.last, self.state, self.first_batches)
        self.phases, self.experiment, self.state = phases, phases.last, state
        self.eval_step = self.experiment.jit_eval_step()
        self.writer.say(f"factored in {duration(time.perf_counter() - begin)}: {sizes(self.experiment)}")

    def first_batches(self) -> Iterator[dict[str, jax.Array]]:
        """What the layers' inputs are measured on."""
        count, mesh = self.config.lowrank.moment_batches, self.experiment.mesh
        return first_batches(self.batches, mesh, count, self.writer.say, self.waiting_for_data)

    def stopping(self) -> bool:
        """The same in all processes at the same step."""
        return self.interrupted or self.votes.outcome != GO_ON

    def evaluate_if_due(self) -> None:
        if self.evaluated is not None or not self.due(self.eval_every) or self.interrupted:
            return
        self.window.check(self.saved)  # of a step that is not finite nothing is evaluated
        evaluated: Evaluated | None = None
        with self.until_stopped():
            evaluated = {
                f"{kind}{suffix}": metrics
                for kind in ("eval", "valid")
                if kind in self.tools.data
                for suffix, metrics in self.evaluate(kind).items()
            }
        if evaluated is None:
            return
        self.take(evaluated)

    def take(self, evaluated: Evaluated) -> None:
        """Notes what an evaluation of the state at hand found."""
        self.check_finite(evaluated)
        self.evaluated, self.evals[self.step] = evaluated, evaluated["eval"]
        current, best = self.score_of(evaluated), self.checkpoints.best()
        self.improved = current is not None and (best is None or current > self.checkpoints.best_score())
        if current is not None:
            self.checkpoints.note_score(self.step, current)
        self.write_evaluation(evaluated)
        if self.tools.on_evaluation:
            self.tools.on_evaluation(self.step, evaluated)

    def score_of(self, evaluated: Evaluated | None) -> float | None:
        """By which the best checkpoint is chosen; the dense network of a warm-up is no rival to the low-rank one."""
        warming_up = self.config.starts_dense and self.phases.at(self.step) is not self.phases.last
        return None if evaluated is None or warming_up else score(evaluated, self.objective.best)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps and at the end happens now."""
        return self.step == self.total or (self.step > 0 and self.step % every == 0)

    def evaluate(self, kind: str) -> Evaluated:
        return evaluate(
            self.eval_step,
            self.state.variables(),
            self.tools.data[kind],
            batch_size=self.config.eval.batch_size,
            mesh=self.experiment.mesh,
            stop_requested=lambda: self.tools.stop.requested,
            waiting=self.waiting_for_data,
        )

    def waiting_for_data(self) -> contextlib.AbstractContextManager[None]:
        return self.tools.stop.waiting_for_data(saved=self.saved is not None)

    def check_finite(self, evaluated: Evaluated) -> None:
        for name in dict.fromkeys(("loss", self.objective.best.metric)):
            for metrics in evaluated.values():
                if metrics[name] is not NOBODY and not np.isfinite(metrics[name]):
                    advice = "Lower optim.lr or set optim.clip_norm." if name == "loss" else "Checkpoints are chosen by it."
                    raise Diverged(f"the evaluated {name} is {metrics[name]:g} at step {self.step}. {advice}")

    def write_evaluation(self, evaluated: Evaluated) -> None:
        self.writer.write(
            self.step, {f"{kind}/{name}": value for kind, metrics in evaluated.items() for name, value in metrics.items()}
        )
        for kind, metrics in evaluated.items():
            figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in measured(metrics))
            raw = " the raw weights" if kind.endswith("_raw") else ""
            held_out = " on the held-out split" if kind.startswith("valid") else ""
            self.writer.say(f"evaluated{raw}{held_out} at step {self.step}: {figures}")

    def save_if_due(self) -> None:
        improved = self.evaluated is not None and self.improved
        if self.saved != self.step and (self.due(self.save_every) or improved or self.switches() or self.stopping()):
            self.save()

    def save_before_giving_up(self) -> None:
        """The state is sound, only the data cannot be read; once it can, the same command continues."""
        if self.step:
            if self.saved != self.step:
                self.save()
            self.checkpoints.wait()
            self.writer.say(f"saved step {self.step} to {self.tools.folder.path}; the same command continues it")

    def save(self) -> None:
        info = {
            "data": self.feed.get_state(),
            "evaluated": self.evaluated,
            "score": self.score_of(self.evaluated),
            "seconds": self.seconds(),
            "window": self.window.check(self.saved),  # what is saved is good
            "metrics": self.tools.folder.metrics.digest(),
            "stable_ranks": self.stable_ranks.rows,
            "low_rank": self.phases.at(self.step) is self.phases.last,
            "jax": jax_settings(),
        }
        self.checkpoints.save(self.step, self.state.saved(), info)
        self.saved = self.step

    def advance(self) -> None:
        assert self.train_step is not None
        mesh = self.experiment.mesh
        with self.profiler.step(self.step + 1):
            position = self.feed.get_state()
            try:
                with self.waiting_for_data():
                    batch = next(self.feed)
            except Stalled:
                self.feed.take_back(position)  # it may have come at the last moment
                raise
            batch = self.votes.cast(put_batch(batch, mesh), failed=self.feed.error is not None)
            self.state, metrics = self.train_step(self.state, batch)
        [metrics] = self.votes.count(metrics)
        self.step, self.evaluated = self.step + 1, None
        self.window.add(self.step, metrics)

    def log_if_due(self) -> None:
        if not self.due(self.log_every):
            return
        undecodable = len(self.tools.data["train"].undecodable)  # met by this process since it started
        scalars = self.window.summary(self.saved) | ({"train/undecodable": undecodable} if undecodable else {})
        self.logged[self.step] = scalars
        self.writer.write(self.step, scalars)
        saved = self.checkpoints.on_disk
        self.writer.say(progress_line(self.step, self.total, scalars, batch_size=self.config.batch_size, saved=saved))

    def finish(self) -> TrainResult:
        self.checkpoints.wait()
        folder = self.tools.folder
        if self.step < self.total or self.evaluated is None:
            self.writer.say(f"stopping: saved step {self.step} to {folder.path}; the same command continues it")
            return TrainResult(self.state, self.logged, self.evals, interrupted=True)
        self.write_result(self.evaluated)
        interrupts.too_late()
        self.writer.say(f"done: {folder.path / 'result.json'}")
        return TrainResult(self.state, self.logged, self.evals, interrupted=False)

    def write_result(self, evaluated: Evaluated) -> None:
        """Writes result.json."""
        experiment, folder = self.experiment, self.tools.folder
        plan = experiment.plan
        self.writer.show(self.step, {"params": plan.params, "macs": plan.macs})  # to set against top1 in the HParams tab
        record = result_record(
            experiment,
            step=self.step,
            dense_steps=self.phases.dense_steps,
            evaluated=evaluated,
            best_step=self.checkpoints.best(),
            seconds=self.seconds(),
            metrics=folder.metrics.digest(),
        )
        folder.write_json("result.json", record)

    def seconds(self) -> float:
        """Wall time of the run so far, earlier processes included."""
        return time.perf_counter() - self.began
