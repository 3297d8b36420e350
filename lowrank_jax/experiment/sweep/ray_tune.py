"""Runs the trials of a sweep on a Ray cluster, through Ray Tune.

A trial is the ordinary training in the ordinary work directory, inside a Ray worker process: it ends when the worker does, and
a worker that is lost is replaced by another one, which goes on from the trial's last checkpoint.  So work directories, and data
if it is given by a path, must be on storage that every node sees, and lowrank_jax must be installed on every node.

Tune schedules, retries and compares; what a trial has done is in its work directory alone, so that it does not matter which
engine ran it before or will go on with it.  A worker waits while Tune judges an evaluation, and reports the last one only when
`result.json` is written: a trial that the scheduler ends can no longer finish, and one that has finished is not ended.
"""

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import platform
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.sweep.trials import Outcome, Trial, known_outcome
from lowrank_jax.experiment.training.loop import score, train
from lowrank_jax.experiment.training.stop import StopSignal
from lowrank_jax.experiment.training.window import Diverged
from lowrank_jax.experiment.workdir.workdir import Workdir

try:
    import ray
    from ray import tune
    from ray.exceptions import RayError
    from ray.tune.schedulers import ASHAScheduler
except ImportError as error:
    missing = f"Ray Tune cannot be imported ({error}); pip install 'lowrank_jax[train,ray]'"
    raise configs.ConfigError("--engine=ray", [missing]) from error

_RETRIES = 2

# Tune's own files and tables off: the work directories have it all.  Ctrl-C is ours to hear.
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one draws a box even when told to be silent
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",  # a buffered trial would train on while it is judged
}

_PASSED_ON = ("JAX_", "XLA_", "LIBTPU_", "TFDS_", "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
_GPU_MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a trial takes of one node while it runs.

    Attributes:
      cpus: cores, for scheduling; JAX takes what it finds.
      gpus: a fraction lets trials share one.
      tpus: chips; those of a host can be had by 1, 2, 4 or 8.
    """

    cpus: float = 1
    gpus: float = 0
    tpus: int = 0

    def check(self) -> None:
        """Raises ConfigError if nothing of the kind can be had."""
        problems = []
        if not all(0 <= amount < math.inf for amount in dataclasses.astuple(self)) or not any(dataclasses.astuple(self)):
            problems.append(f"{self}: must be at least 0, and not all of them 0")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            problems.append(f"gpus: {self.gpus:g}; a fraction of one, or a whole number")
        if self.tpus not in (0, 1, 2, 4, 8):
            problems.append(f"tpus: {self.tpus}; must be 1, 2, 4 or 8")
        if problems:
            raise configs.ConfigError("--cpus, --gpus, --tpus", problems)

    def bundle(self) -> dict[str, float]:
        """By the names that Ray has for them."""
        named = {"CPU": float(self.cpus), "GPU": float(self.gpus), "TPU": float(self.tpus)}
        return {name: amount for name, amount in named.items() if amount}


@dataclasses.dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving (Li et al., 2020): ends the trials that are behind at the same step.

    Attributes:
      grace: the step before which no trial is ended.
      reduction: of the trials at a rung one in so many goes on; rungs are at grace, grace * reduction, and so on.
    """

    grace: int
    reduction: float = 4

    def scheduler(self, trials: Sequence[Trial]) -> ASHAScheduler:
        """Judges by the evaluations that Tune is told of and by those of trials that have ended before.

        Raises:
          ConfigError: it cannot work like that.
        """
        longest = max(trial.config.total_steps for trial in trials)
        problems = []
        if not 1 <= self.grace <= longest:
            problems.append(f"grace: {self.grace}; must be from 1 to {longest}, the steps of the longest trial")
        if not self.reduction > 1:
            problems.append(f"reduction: {self.reduction:g}; must be more than 1")
        if problems:
            raise configs.ConfigError("--asha", problems)
        # A trial at max_t is at its end anyway.  With stop_last_trials, besides, one with fewer evaluations than rungs would
        # later be compared at those that it had skipped.
        return ASHAScheduler(
            time_attr="step",
            metric="top1",
            mode="max",
            max_t=longest,
            grace_period=self.grace,
            reduction_factor=self.reduction,
            stop_last_trials=False,
        )


@dataclasses.dataclass(frozen=True)
class _Job:
    """A trial as it travels to its worker, which reads the config anew, for the devices that it has."""

    workdir: str
    config: dict[str, Any]


def run(
    trials: Sequence[Trial],
    *,
    address: str | None = None,
    jobs: int | None = None,
    resources: Resources | None = None,
    asha: Asha | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Outcome]:
    """Runs those trials that have not ended yet; Ctrl-C and SIGTERM save them, for the same call to go on with.

    Args:
      trials: in the order in which to start them.
      address: of a Ray cluster, such as "auto" or "host:6379"; None for `RAY_ADDRESS`, or else one of this machine's own.
      jobs: how many may run at the same time; None for as many as the cluster has room for.
      resources: of each trial; by default one CPU.
      asha: ends the poor ones early; by default none.
      say: is given a line for each trial that ends.

    Returns:
      how each trial ended, by name.

    Raises:
      ConfigError: resources or asha cannot be.
      ConnectionError: there is no cluster at the address.
    """
    resources = resources or Resources()
    resources.check()
    scheduler = asha.scheduler(trials) if asha and trials else None
    outcomes = {trial.name: ended for trial in trials if (ended := known_outcome(trial))}
    waiting = {trial.name: trial for trial in trials if trial.name not in outcomes}
    if waiting:
        if scheduler:
            _replay(scheduler, [trial for trial in trials if trial.name in outcomes])
        with _environment(_QUIET), _connected(address, resources):
            if not _fits(resources):
                say(f"no node of the cluster has {resources.bundle()}; waiting for one")
            events = _Events(waiting, say)
            with StopSignal() as stop:
                _tune(waiting, events, stop, jobs=jobs, resources=resources, scheduler=scheduler)
        outcomes |= events.outcomes
    return {trial.name: outcomes.get(trial.name) or known_outcome(trial) or Outcome("interrupted") for trial in trials}


def _tune(
    trials: Mapping[str, Trial],
    events: "_Events",
    stop: StopSignal,
    *,
    jobs: int | None,
    resources: Resources,
    scheduler: ASHAScheduler | None,
) -> None:
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what it has to say, `events` does
    flag = _start_flag()
    travelling = {name: _Job(_absolute(trial.workdir), configs.to_dict(trial.config)) for name, trial in trials.items()}
    folder = str(pathlib.Path.cwd())

    def trainable(point: dict[str, Any]) -> None:
        _work(travelling[point["trial"]], folder, flag)

    # No trial has a checkpoint of Tune's kind: nothing in its folder outlives the call.
    with tempfile.TemporaryDirectory(prefix="lowrank_jax_tune_") as scratch:
        tune.run(
            trainable,
            config={"trial": tune.grid_search(list(trials))},
            resources_per_trial=tune.PlacementGroupFactory([resources.bundle()]),
            max_concurrent_trials=jobs,
            max_failures=_RETRIES,
            scheduler=scheduler,
            stop=_Interruption(stop, flag),
            callbacks=[events],
            storage_path=scratch,
            trial_dirname_creator=lambda trial: trial.trial_id,
            raise_on_failed_trial=False,
            verbose=0,
        )


class _Events(tune.Callback):
    """Hears from Tune how trials end, and marks those that the scheduler ends."""

    def __init__(self, trials: Mapping[str, Trial], say: Callable[[str], None]):
        self.outcomes: dict[str, Outcome] = {}
        self._trials, self._say = trials, say

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last, own = trial.last_result, self._trials[trial.config["trial"]]
        if "status" in last:
            top1 = "" if math.isnan(last["top1"]) else f"top1 {last['top1']:.4f}"
            self._note(own.name, Outcome(last["status"], last["reason"]), top1)
            return
        marker = {"by": "asha", "step": last["step"], "top1": last["top1"]}
        Workdir(own.workdir).write_json("stopped.json", marker)
        self._note(own.name, Outcome("stopped", f"by asha at step {last['step']}"), f"top1 {last['top1']:.4f}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        attempt = f"attempt {trial.run_metadata.num_failures + 1} of {_RETRIES + 1}"
        self._say(f"{trial.config['trial']}: {_last_line(trial)}; {attempt} goes on from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = f"{_last_line(trial)}; {trial.run_metadata.num_failures} attempts"
        Workdir(self._trials[trial.config["trial"]].workdir).note_failure(diverged=False, reason=reason)
        self._note(trial.config["trial"], Outcome("failed", reason))

    def _note(self, name: str, outcome: Outcome, figures: str = "") -> None:
        self.outcomes[name] = outcome
        count = f"[{len(self.outcomes)}/{len(self._trials)}]"
        self._say("  ".join(part for part in (count, name, outcome.status, outcome.reason, figures) if part))


def _last_line(trial: Any) -> str:
    """Of the last error of a Tune trial, which is where Python and Ray say what it was."""
    lines = pathlib.Path(trial.error_file).read_text().strip().splitlines()
    return lines[-1].strip().partition(" Some common causes include")[0]


class _Interruption(tune.Stopper):
    """Ends everything once a signal has come, and lets the workers know, who then save."""

    def __init__(self, stop: StopSignal, flag: Any):
        self._stop, self._flag = stop, flag

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._stop.requested:
            self._flag.up.remote()
        return self._stop.requested


def _start_flag() -> Any:
    """An actor that workers can wait for; Tune itself reaches a trial only when it reports."""

    class Flag:  # local, so that its process need not import this module, and jax with it
        def __init__(self):
            self._is_up = asyncio.Event()

        async def up(self) -> None:
            self._is_up.set()

        async def wait(self) -> None:
            await self._is_up.wait()

    return ray.remote(num_cpus=0)(Flag).remote()


def _replay(scheduler: ASHAScheduler, trials: Sequence[Trial]) -> None:
    """Has the scheduler judge by trials of earlier calls too, as if all had been one call."""
    for trial in trials:
        stand_in: Any = _StandIn(trial.name)
        scheduler.on_trial_add(None, stand_in)  # pyright: ignore[reportArgumentType]
        for step, top1 in Workdir(trial.workdir).evaluations():
            scheduler.on_trial_result(None, stand_in, {"step": step, "top1": top1})  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class _StandIn:
    """All that the scheduler asks of a Tune trial."""

    trial_id: str


def _work(job: _Job, folder: str, flag: Any) -> None:
    """Trains, in a thread of the worker process, and tells Tune how it ended."""
    if pathlib.Path(folder).is_dir():  # relative paths in the config mean what they meant at the driver
        os.chdir(folder)
    with _logged(job.workdir):
        print(f"process {os.getpid()} on {platform.node()}", flush=True)
        try:
            report = _train(job, flag)
        except Diverged as error:
            report = _report("diverged", _one_line(error))
        except UserError as error:
            report = _report("failed", _one_line(error))
        except Exception:
            traceback.print_exc()
            raise
        if report["reason"]:
            print(report["reason"], flush=True)
    tune.report(report)


def _train(job: _Job, flag: Any) -> dict[str, Any]:
    config = configs.parse(job.config, devices=jax.device_count())
    stop = StopSignal()
    threading.Thread(target=_listen, args=(flag, stop), daemon=True).start()

    def on_evaluation(step: int, evaluated: dict[str, dict[str, float]]) -> None:
        if step < config.total_steps:  # returns when Tune has judged it, or never
            tune.report({"step": step, "training_iteration": step, "top1": score(evaluated)})

    if train(config, job.workdir, stop=stop, on_evaluation=on_evaluation).interrupted:
        return _report("interrupted")
    return _report("done", step=config.total_steps, top1=Workdir(job.workdir).evaluations()[-1][1])


def _listen(flag: Any, stop: StopSignal) -> None:
    with contextlib.suppress(RayError):  # without the flag a signal ends the worker unsaved, no more
        ray.get(flag.wait.remote())
        stop.requested = True


def _report(status: str, reason: str = "", *, step: int | None = None, top1: float = math.nan) -> dict[str, Any]:
    """The last report of a trial; one without a step does not count for the scheduler."""
    at = {} if step is None else {"step": step, "training_iteration": step}
    return {"status": status, "reason": reason, "top1": top1, "done": True, **at}


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())


@contextlib.contextmanager
def _logged(workdir: str) -> Iterator[None]:
    """Sends what training prints to log.txt; where the folder is remote it stays with Ray's logs of the worker."""
    if "://" in workdir:
        yield
        return
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    with (
        (pathlib.Path(workdir) / "log.txt").open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


@contextlib.contextmanager
def _connected(address: str | None, resources: Resources) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}  # Ray leaves its own behind
    ray.init(
        address or os.environ.get("RAY_ADDRESS") or "local",
        runtime_env={"env_vars": _worker_environment(resources)},
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _worker_environment(resources: Resources) -> dict[str, str]:
    """What the workers' processes start with, beside what their nodes give them."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
        if (value := jax.config.values[name]) is not None:  # trials of a sweep often are the same programs
            passed[name.upper()] = str(value)
    if not resources.gpus and not resources.tpus:  # Ray hides accelerators only from those that have asked for some
        passed.setdefault("JAX_PLATFORMS", "cpu")
    if 0 < resources.gpus < 1 and not any(name in passed for name in _GPU_MEMORY):
        passed["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * resources.gpus:.3f}"  # JAX would take three quarters at once
    return {**passed, "PYTHONPATH": os.pathsep.join(_own_paths())}


def _own_paths() -> list[str]:
    """Where the driver finds modules other than installed ones: a checkout, the user's models."""
    own = [path for path in sys.path if not path.startswith((sys.prefix, sys.base_prefix))]
    return list(dict.fromkeys(str(pathlib.Path(path).absolute()) for path in own))


def _absolute(workdir: str) -> str:
    return workdir if "://" in workdir else str(pathlib.Path(workdir).absolute())


def _fits(resources: Resources) -> bool:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(name, 0) >= amount for name, amount in resources.bundle().items()) for node in nodes)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
