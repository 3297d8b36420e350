"""The training loop, top to bottom as a run happens."""

import collections
import dataclasses
import platform
import signal
import threading
import time
from importlib import metadata
from typing import Any

import jax
import numpy as np

from lowrank_jax import experiment as experiments
from lowrank_jax.checkpoint import Checkpoints
from lowrank_jax.config import Config, to_dict
from lowrank_jax.data import datasets
from lowrank_jax.data.pipeline import Shard, TrainBatches, train_iterator
from lowrank_jax.evaluate import Interrupted, evaluate
from lowrank_jax.sharding import put_batch
from lowrank_jax.state import TrainState
from lowrank_jax.workdir import Workdir, config_digest
from lowrank_jax.writer import Writer, duration, progress_line


class Diverged(Exception):
    """The loss or the gradient is not finite."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run leaves behind, for whoever called it.

    Attributes:
      state: the final state.
      train: the training metrics as logged, by step.
      evals: the evaluations of this process, by step.
      interrupted: it was stopped and saved before its end.
    """

    state: TrainState
    train: dict[int, dict[str, float]]
    evals: dict[int, dict[str, float]]
    interrupted: bool


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours between steps; a second Ctrl-C ends at once."""

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class Window:
    """The metrics of the steps since the last log, left on the devices until they are asked for."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._metrics: list[dict[str, jax.Array]] = []
        self._in_flight: collections.deque[jax.Array] = collections.deque()
        self._first = 0
        self.seconds = 0.0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Notes a step; waits only so that the devices' queue stays short."""
        self._first = self._first if self._metrics else step
        self._metrics.append(metrics)
        self._in_flight.append(metrics["loss"])
        if len(self._in_flight) > 2:
            self._in_flight.popleft().block_until_ready()

    def check(self, lr: float, last_good: int | None) -> dict[str, np.ndarray]:
        """The metrics as arrays over steps.

        Raises:
          Diverged: one of them is not finite.
        """
        rows = jax.device_get(self._metrics)
        columns = {name: np.array([row[name] for row in rows], np.float64) for name in (rows[0] if rows else {})}
        for i in range(len(rows)):
            loss, norm = columns["loss"][i], columns["grad_norm"][i]
            if not np.isfinite([loss, norm]).all():
                before = f"Last good checkpoint: {last_good}." if last_good is not None else "There is no checkpoint yet."
                raise Diverged(
                    f"loss is {loss:g} at step {self._first + i} (learning rate {lr:.3g}, gradient norm {norm:.3g})."
                    f" {before} Lower optim.lr or set optim.clip_norm."
                )
        return columns

    def summary(self, lr: float, last_good: int | None) -> dict[str, float]:
        """Means over the window, which starts anew."""
        columns = self.check(lr, last_good)
        count = len(self._metrics)
        scalars = {f"train/{name}": float(values.mean()) for name, values in columns.items()}
        scalars["train/lr"] = lr
        scalars["train/seconds_per_step"] = self.seconds / count
        scalars["train/images_per_second"] = self._batch_size * count / self.seconds
        self._metrics, self.seconds = [], 0.0
        return scalars


def train(config: Config, workdir: str, *, source: str = "config") -> Run:
    """Trains until the end or until stopped; started again on the same work directory, it goes on exactly.

    Raises:
      ConfigError, WorkdirError, DataError, CheckpointError: it cannot start; the message says why.
      Diverged: it cannot go on.
    """
    experiment = experiments.build(config, source)
    total = config.total_steps
    eval_every, save_every, log_every = (
        max(1, config.in_steps(section.every)) for section in (config.eval, config.checkpoint, config.log)
    )
    train_data = datasets.load(experiment.dataset, config.dataset.train_split, config.dataset.data_dir)
    eval_data = datasets.load(experiment.dataset, config.dataset.eval_split, config.dataset.data_dir)

    folder = Workdir(workdir)
    folder.claim(to_dict(config))
    folder.write_text("overview.txt", f"{experiment.plan}\n")
    writer = Writer(folder)
    checkpoints = Checkpoints(folder.checkpoints.resolve(), keep=config.checkpoint.keep)
    plan = experiment.plan
    writer.say(
        f"{config.model.name} on {config.dataset.name}: {len(plan.factored)} of {len(plan.kernels)} kernels factored by"
        f" {config.lowrank.method}, {plan.params / 1e6:.3g}M of {plan.dense_params / 1e6:.3g}M parameters;"
        f" {total} steps on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )

    iterator = train_iterator(
        TrainBatches(
            train_data,
            config.batch_size,
            total,
            config.seed,
            config.dataset.flip,
            config.dataset.crop_padding,
            Shard(jax.process_index(), jax.process_count()),
        )
    )
    logged: dict[int, dict[str, float]] = {}
    evals: dict[int, dict[str, float]] = {}
    with StopSignal() as stop:
        # Restore, or begin.
        restored = checkpoints.restore(experiment.shapes)
        if restored is None:
            state, step, evaluated, spent, saved = experiment.init(), 0, None, 0.0, None
        else:
            for damaged, reason in restored.damaged.items():
                writer.say(f"{workdir}: checkpoint {damaged} is damaged ({reason}); going on from {restored.step}")
            state, step, saved = restored.state, restored.step, restored.step
            evaluated, spent = restored.info["eval"], restored.info["seconds"]
            iterator.set_state(restored.info["data"])
            folder.forget_metrics_after(step, evaluated=evaluated is not None)
            writer.say(f"resuming {workdir} from step {step} (data, randomness and optimiser included)")
        best = checkpoints.best_score()
        begin = time.perf_counter()
        if step < total:
            writer.say("compiling the training step ...")
            train_step = experiment.compile_train_step()
            writer.say(f"compiled in {duration(time.perf_counter() - begin)}")
        eval_step = experiment.jit_eval_step()
        window = Window(config.batch_size)

        def rate() -> float:
            return float(experiment.schedule(max(0, step - 1)))

        while True:
            # Evaluate the state as it is.
            if evaluated is None and (step == total or (step and step % eval_every == 0)) and not stop.requested:
                try:
                    evaluated = evaluate(
                        eval_step,
                        state.params,
                        state.batch_stats,
                        eval_data,
                        batch_size=config.eval.batch_size,
                        mesh=experiment.mesh,
                        stop_requested=lambda: stop.requested,
                    )
                except Interrupted:
                    pass
                else:
                    evals[step] = evaluated
                    writer.write(step, {f"eval/{name}": value for name, value in evaluated.items()})
                    writer.say(
                        f"evaluated at step {step}: top1 {evaluated['top1']:.4f}  top5 {evaluated['top5']:.4f}"
                        f"  loss {evaluated['loss']:.4f}"
                    )

            # Save before the iterator moves on.
            improved = evaluated is not None and evaluated["top1"] > best
            due = step == total or (step > 0 and step % save_every == 0) or improved or stop.requested
            if due and saved != step:
                window.check(rate(), saved)
                seconds = spent + time.perf_counter() - begin
                checkpoints.save(step, state, {"data": iterator.get_state(), "eval": evaluated, "seconds": seconds})
                saved, best = step, max(best, evaluated["top1"] if evaluated else best)
            if step == total or stop.requested:
                break

            # Step.
            tick = time.perf_counter()
            batch = put_batch(next(iterator), experiment.mesh)
            state, metrics = train_step(state, batch)
            step, evaluated = step + 1, None
            window.add(step, metrics)
            if step % log_every == 0 or step == total:
                jax.block_until_ready(metrics)
            window.seconds += time.perf_counter() - tick

            # Log.
            if step % log_every == 0 or step == total:
                logged[step] = window.summary(rate(), saved)
                writer.write(step, logged[step])
                writer.say(
                    progress_line(step, total, logged[step], rate=logged[step]["train/images_per_second"], saved=saved)
                )
        checkpoints.wait()
    interrupted = step < total or evaluated is None
    if interrupted:
        writer.say(f"stopping: saved step {step} to {workdir}; the same command continues it")
    else:
        folder.write_json(
            "result.json",
            {
                "step": step,
                "params": plan.params,
                "dense_params": plan.dense_params,
                "macs": plan.macs,
                "eval": evaluated,
                "best_step": checkpoints.best(),
                "seconds": spent + time.perf_counter() - begin,
                "versions": _versions(),
                "config_digest": config_digest(to_dict(config)),
            },
        )
        writer.say(f"done: {workdir}/result.json")
    checkpoints.close()
    writer.close()
    return Run(state, logged, evals, interrupted)


def _versions() -> dict[str, str]:
    packages = ("lowrank_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
