"""The training loop, top to bottom as a run happens."""

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np

from lowrank_jax.experiment.config.files import to_dict
from lowrank_jax.experiment.config.parse import Config
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.pipeline import Feed, TrainBatches, shard_of
from lowrank_jax.experiment.hosts.processes import OtherFailed, gather
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.hosts.votes import FAIL, GO_ON, LAG, Votes
from lowrank_jax.experiment.training.build import Experiment, build
from lowrank_jax.experiment.training.evaluate import Interrupted, evaluate
from lowrank_jax.experiment.training.overview import describe
from lowrank_jax.experiment.training.profiler import Tracer
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.training.stop import StopSignal
from lowrank_jax.experiment.training.window import Diverged, Window
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.identity import config_digest, flatten
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from lowrank_jax.experiment.workdir.writer import Writer, duration, progress_line
from lowrank_jax.text import count

OnEvaluation = Callable[[int, dict[str, dict[str, float]]], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run leaves behind, for whoever called it.

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


def train(
    config: Config,
    workdir: str,
    *,
    source: str = "config",
    stop: StopSignal | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Run:
    """Trains until the end or until stopped; started again on the same work directory, it goes on exactly.

    Where a run has several processes, all of them call this; they stop together, whichever of them is asked to.

    Args:
      config: the experiment.
      workdir: its folder, local or remote.
      source: what to call the config in messages.
      stop: what stops it; by default a signal.  For callers that hear of it in another way.
      on_evaluation: is told of every evaluation, step and metrics, once they are written down.

    Raises:
      ConfigError, WorkdirError, DataError, CheckpointError: it cannot start; the message says why.
      Diverged: it cannot go on.
      OtherFailed: another process of the run cannot.
    """
    experiment = build(config, source)
    data = {
        kind: datasets.load(experiment.dataset, split, config.dataset.data_dir)
        for kind in ("train", "eval", "valid")
        if (split := getattr(config.dataset, f"{kind}_split"))
    }
    folder = Workdir(workdir, active=jax.process_index() == 0)
    _agree(to_dict(config))
    folder.claim(to_dict(config))
    gather("claimed")
    folder.check_shared()
    with folder.locked():
        folder.forget_failure()
        folder.write_text("overview.txt", f"{describe(experiment)}\n")
        with Writer(folder) as writer, Checkpoints(folder.checkpoints, keep=config.checkpoint.keep) as checkpoints:
            writer.say(_headline(experiment))
            writer.show_settings(flatten(to_dict(config)))
            with stop or StopSignal() as stop:
                try:
                    return _Loop(experiment, data, folder, writer, checkpoints, stop, on_evaluation).run()
                except Diverged as error:
                    folder.note_failure(diverged=True, reason=str(error))
                    checkpoints.wait()  # all processes come here, and what the message calls the last good one is on its way
                    raise


class _Loop:
    """The loop's moving parts; `run` is the order in which they move."""

    def __init__(
        self,
        experiment: Experiment,
        data: dict[str, datasets.Split],
        folder: Workdir,
        writer: Writer,
        checkpoints: Checkpoints,
        stop: StopSignal,
        on_evaluation: OnEvaluation | None = None,
    ):
        config = experiment.config
        self.experiment, self.config, self.data = experiment, config, data
        self.objective = experiment.objective
        self.folder, self.writer, self.checkpoints, self.stop = folder, writer, checkpoints, stop
        self.on_evaluation = on_evaluation
        self.total = config.total_steps
        self.eval_every = max(1, config.in_steps(config.eval.every))
        self.save_every = max(1, config.in_steps(config.checkpoint.every))
        self.log_every = max(1, config.in_steps(config.log.every))
        self.votes = Votes(experiment.mesh, lambda: self.stop.requested)
        self.batches = TrainBatches(
            data["train"],
            config.batch_size,
            self.total,
            config.seed,
            config.dataset.to_augmentation(),
            shard_of(experiment.mesh),
        )
        # The others hear of a batch that cannot be read while there still are batches for the steps until then.
        self.feed = Feed(self.batches, ahead=LAG + 1 if self.votes.shared else 0)
        self.interrupted = False  # in an evaluation
        self.logged: dict[int, dict[str, float]] = {}
        self.evals: dict[int, dict[str, float]] = {}
        self.begin = time.perf_counter()

    def run(self) -> Run:
        self.restore_or_init()
        self.compile()
        try:
            with self.tracer:
                self.advance_to_the_end()
        except (datasets.DataError, OtherFailed):
            self.save_before_giving_up()
            raise
        return self.finish()

    def advance_to_the_end(self) -> None:
        self.feed.fill()
        if any(gather("failed" if self.feed.error else "")):
            raise self.feed.error or OtherFailed
        while True:
            with self.window.paused():
                self.evaluate_if_due()  # the state as it is, before it changes
                self.save_if_due()  # before the iterator moves on
            if self.step == self.total or self.stopping():
                break
            self.advance()
            self.log_if_due()
        if self.votes.outcome == FAIL:
            raise self.feed.error or OtherFailed

    def stopping(self) -> bool:
        """The same in all processes at the same step."""
        return self.interrupted or self.votes.outcome != GO_ON

    def restore_or_init(self) -> None:
        restored = self.checkpoints.restore(self.experiment.shapes)
        self.improved = False  # by the evaluation of the state at hand
        if restored is None:
            first = (put_batch(self.batches[i], self.experiment.mesh) for i in range(self.config.lowrank.moment_batches))
            self.state, self.step, self.saved = self.experiment.init(first), 0, None
            self.evaluated, self.seconds_before, self.rows = None, 0.0, []
            self.folder.forget_metrics_after(-1, evaluated=False)
            return
        for step, reason in restored.damaged.items():
            self.writer.say(f"{self.folder.path}: checkpoint {step} is damaged ({reason}); going on from {restored.step}")
        self.state, self.step, self.saved = restored.state, restored.step, restored.step
        self.evaluated, self.seconds_before = restored.info.get("evaluated"), restored.info["seconds"]
        self.rows = restored.info["window"]
        self.feed.set_state(restored.info["data"])
        self.folder.forget_metrics_after(self.step, evaluated=self.evaluated is not None)
        self.writer.say(f"resuming {self.folder.path} from step {self.step} (data, randomness and optimiser included)")

    def compile(self) -> None:
        self.eval_step = self.experiment.jit_eval_step()
        if self.step < self.total:
            self.writer.say("compiling the training step ...")
            begin = time.perf_counter()
            self.train_step = self.experiment.compile_train_step()
            self.writer.say(f"compiled in {duration(time.perf_counter() - begin)}")
        self.window = Window(self.config.batch_size, self.step, self.rows)  # its clock starts here
        self.tracer = Tracer(
            self.config.profile.steps,
            self.folder.path,
            state=lambda: self.state,
            paused=self.window.paused,
            say=self.writer.say,
        )

    def evaluate_if_due(self) -> None:
        due = self.step == self.total or (self.step > 0 and self.step % self.eval_every == 0)
        if not due or self.evaluated is not None:
            return
        try:
            evaluated = {
                f"{kind}{suffix}": metrics
                for kind in ("eval", "valid")
                if kind in self.data
                for suffix, metrics in self.evaluate(kind).items()
            }
        except Interrupted:
            self.interrupted = True
            return
        for name in ("loss", self.objective.deciding):
            for metrics in evaluated.values():
                if not np.isfinite(metrics[name]):
                    raise Diverged(
                        f"the evaluated {name} is {metrics[name]:g} at step {self.step}. Lower optim.lr or set optim.clip_norm."
                    )
        self.evaluated, self.evals[self.step] = evaluated, evaluated["eval"]
        current = score(evaluated, self.objective.deciding)
        self.improved = self.checkpoints.best() is None or current > self.checkpoints.best_score()
        self.checkpoints.note_score(self.step, current)
        self.writer.write(
            self.step, {f"{kind}/{name}": value for kind, metrics in evaluated.items() for name, value in metrics.items()}
        )
        for kind, metrics in evaluated.items():
            figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in (*self.objective.metrics, "loss"))
            raw = " the raw weights" if kind.endswith("_raw") else ""
            held_out = " on the held-out part" if kind.startswith("valid") else ""
            self.writer.say(f"evaluated{raw}{held_out} at step {self.step}: {figures}")
        if self.on_evaluation:
            self.on_evaluation(self.step, evaluated)

    def evaluate(self, kind: str) -> dict[str, dict[str, float]]:
        return evaluate(
            self.eval_step,
            self.state.variables(),
            self.data[kind],
            batch_size=self.config.eval.batch_size,
            mesh=self.experiment.mesh,
            stop_requested=lambda: self.stop.requested,
        )

    def save_if_due(self) -> None:
        regular = self.step == self.total or (self.step > 0 and self.step % self.save_every == 0)
        improved = self.evaluated is not None and self.improved
        if self.saved != self.step and (regular or improved or self.stopping()):
            self.save()

    def save_before_giving_up(self) -> None:
        """The data cannot be read any further, but the state is sound: once that is seen to, the same command goes on."""
        if self.step:
            if self.saved != self.step:
                self.save()
            self.checkpoints.wait()
            self.writer.say(f"saved step {self.step} to {self.folder.path}; the same command continues it")

    def save(self) -> None:
        info = {
            "data": self.feed.get_state(),
            "evaluated": self.evaluated,
            "score": score(self.evaluated, self.objective.deciding) if self.evaluated else None,
            "seconds": self.seconds(),
            "window": self.window.check(self.saved),  # what is saved is good
        }
        self.checkpoints.save(self.step, self.state, info)
        self.saved = self.step

    def advance(self) -> None:
        with self.tracer.step(self.step + 1):
            batch = self.votes.cast(put_batch(next(self.feed), self.experiment.mesh), failed=self.feed.error is not None)
            self.state, metrics = self.train_step(self.state, batch)
        [metrics] = self.votes.count(metrics)
        self.step, self.evaluated = self.step + 1, None
        self.window.add(self.step, metrics)

    def log_if_due(self) -> None:
        if self.step % self.log_every and self.step != self.total:
            return
        undecodable = len(self.data["train"].undecodable)  # met by this process since it started
        scalars = self.window.summary(self.saved) | ({"train/undecodable": undecodable} if undecodable else {})
        self.logged[self.step] = scalars
        self.writer.write(self.step, scalars)
        metric, batch_size = self.objective.deciding, self.config.batch_size
        self.writer.say(progress_line(self.step, self.total, scalars, metric=metric, batch_size=batch_size, saved=self.saved))

    def finish(self) -> Run:
        self.checkpoints.wait()
        interrupted = self.step < self.total or self.evaluated is None
        if interrupted:
            self.writer.say(f"stopping: saved step {self.step} to {self.folder.path}; the same command continues it")
        else:
            plan = self.experiment.plan
            self.writer.show(self.step, {"params": plan.params, "macs": plan.macs})  # to set against top1 in the HParams tab
            self.folder.write_json("result.json", self.result())
            self.writer.say(f"done: {self.folder.path / 'result.json'}")
        return Run(self.state, self.logged, self.evals, interrupted)

    def result(self) -> dict[str, Any]:
        assert self.evaluated is not None
        plan = self.experiment.plan
        return {
            "step": self.step,
            "params": plan.params,
            "dense_params": plan.dense_params,
            "macs": plan.macs,
            "dense_macs": plan.dense_macs,
            "eval": self.evaluated["eval"],
            "valid": self.evaluated.get("valid"),
            "eval_raw": self.evaluated.get("eval_raw"),
            "valid_raw": self.evaluated.get("valid_raw"),
            "best_step": self.checkpoints.best(),
            "seconds": self.seconds(),
            "versions": _versions(),
            "config_digest": config_digest(to_dict(self.config)),
        }

    def seconds(self) -> float:
        """Wall time of the run so far, earlier processes included."""
        return self.seconds_before + time.perf_counter() - self.begin


def _agree(config: dict[str, Any]) -> None:
    """Sees to it that all processes have one experiment.

    Raises:
      WorkdirError: they have not.
    """
    ours = {key: value for key, value in flatten(config).items() if key != "dataset.data_dir"}
    first, *others = [json.loads(text) for text in gather(json.dumps(ours))]
    for process, theirs in enumerate(others, start=1):
        different = [f"{key} is {theirs.get(key)}, not {first[key]}" for key in first if theirs.get(key) != first[key]]
        if different:
            raise WorkdirError(f"process {process} was given other settings than process 0: {'; '.join(different)}")


def score(evaluated: dict[str, dict[str, float]], metric: str = "top1") -> float:
    """What runs and checkpoints are chosen by: a metric on the held-out part of the training data, where there is one."""
    return evaluated.get("valid", evaluated["eval"])[metric]


def _headline(experiment: Experiment) -> str:
    config, plan = experiment.config, experiment.plan
    return (
        f"{config.model.name} on {config.dataset.name}: {len(plan.factored)} of {len(plan.kernels)} kernels factored by"
        f" {config.lowrank.method}, {count(plan.params)} of {count(plan.dense_params)} parameters;"
        f" {config.total_steps} steps on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )


def _versions() -> dict[str, str]:
    packages = ("lowrank_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
