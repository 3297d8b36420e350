"""Runs the trials of a sweep on a Ray cluster with Ray Tune.

A trial is ordinary training in an ordinary work directory, inside a Ray worker process.  A lost worker is replaced by another
one, which resumes from the trial's last checkpoint.  So work directories, and data given by a path, must be on storage that
every node can reach, and lowrank_jax must be installed on every node.

Tune schedules, retries and compares.  The state of a trial is only in its work directory, so any engine can continue it.  A
worker waits while Tune judges an evaluation, and reports the last one only after `result.json` is written: a trial that the
scheduler ends cannot finish any more, and one that has finished is not ended.
"""

import asyncio
import contextlib
import dataclasses
import io
import logging
import math
import os
import pathlib
import platform
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment import temporary
from lowrank_jax.experiment.data import kept
from lowrank_jax.experiment.errors import InUse, UserError
from lowrank_jax.experiment.sweep.asha import Asha, replay
from lowrank_jax.experiment.sweep.ray_cluster import Resources, connected, fits
from lowrank_jax.experiment.sweep.trials import Outcome, Trial, known_outcome
from lowrank_jax.experiment.training.log_window import Diverged
from lowrank_jax.experiment.training.loop import score, train
from lowrank_jax.experiment.training.stop import StopSignal
from lowrank_jax.experiment.workdir import files
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

# No files and tables of Tune's own: the work directories have everything.  We handle Ctrl-C ourselves.
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output draws a box even at verbose=0
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",  # with a buffer, a trial would train on while it is judged
}


@dataclasses.dataclass(frozen=True)
class _Job:
    """A trial as sent to its worker, which parses the config again for its own devices."""

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
    """Runs the trials that have not ended yet.  Ctrl-C and SIGTERM save them; the same call resumes.

    Args:
      trials: in the order in which to start them.
      address: of a Ray cluster, for example "auto" or "host:6379"; None for `RAY_ADDRESS`, else a new one on this machine.
      jobs: maximum number of trials at a time; None for as many as fit the cluster.
      resources: of each trial; default: one CPU.
      asha: ends poor trials early; default: no.
      say: called with a line for each trial that ends.

    Returns:
      The outcome of every trial by name.

    Raises:
      ConfigError: resources or asha are not valid.
      ConnectionError: there is no cluster at the address.
    """
    resources = resources or Resources()
    resources.check()
    scheduler = asha.scheduler(trials) if asha and trials else None
    outcomes = {trial.name: ended for trial in trials if (ended := known_outcome(trial))}
    waiting = {trial.name: trial for trial in trials if trial.name not in outcomes}
    if waiting:
        if scheduler:
            replay(scheduler, [trial for trial in trials if trial.name in outcomes])
        with _environment(_QUIET), connected(address, resources):
            if not fits(resources):
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
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # `events` reports instead
    flag = _start_flag()
    travelling = {name: _Job(_absolute(trial.workdir), configs.to_dict(trial.config)) for name, trial in trials.items()}
    folder = str(pathlib.Path.cwd())

    def trainable(point: dict[str, Any]) -> None:
        _work(travelling[point["trial"]], folder, flag)

    # Trials have no checkpoints of Tune's kind: its folder is scratch space.
    with temporary.folder("lowrank_tune_") as scratch:
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


def _absolute(workdir: str) -> str:
    return workdir if "://" in workdir else str(pathlib.Path(workdir).absolute())


class _Events(tune.Callback):
    """Records how trials end, and marks those that the scheduler ends."""

    def __init__(self, trials: Mapping[str, Trial], say: Callable[[str], None]):
        self.outcomes: dict[str, Outcome] = {}
        self._trials, self._say = trials, say

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last, own = trial.last_result, self._trials[trial.config["trial"]]
        metric = own.config.best.metric
        if "status" in last:
            figures = f"{metric} {last[metric]:.4f}" if math.isfinite(last.get(metric, math.nan)) else ""
            self._note(own.name, Outcome(last["status"], last["reason"]), figures)
            return
        marker = {"by": "asha", "step": last["step"], metric: last[metric]}
        Workdir(own.workdir).write_json("stopped.json", marker)
        self._note(own.name, Outcome("stopped", f"by asha at step {last['step']}"), f"{metric} {last[metric]:.4f}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        attempt = f"attempt {trial.run_metadata.num_failures + 1} of {_RETRIES + 1}"
        self._say(f"{trial.config['trial']}: {_last_line(trial)}; {attempt} resumes from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = f"{_last_line(trial)}; {trial.run_metadata.num_failures} attempts"
        Workdir(self._trials[trial.config["trial"]].workdir).note_failure(diverged=False, reason=reason)
        self._note(trial.config["trial"], Outcome("failed", reason))

    def _note(self, name: str, outcome: Outcome, figures: str = "") -> None:
        self.outcomes[name] = outcome
        count = f"[{len(self.outcomes)}/{len(self._trials)}]"
        self._say("  ".join(part for part in (count, name, outcome.status, outcome.reason, figures) if part))


def _last_line(trial: Any) -> str:
    """The last line of a Tune trial's last error, where Python and Ray name it."""
    lines = pathlib.Path(trial.error_file).read_text().strip().splitlines()
    return lines[-1].strip().partition(" Some common causes include")[0]


class _Interruption(tune.Stopper):
    """Ends everything after a signal, and tells the workers to save."""

    def __init__(self, stop: StopSignal, flag: Any):
        self._stop, self._flag = stop, flag

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._stop.requested:
            self._flag.up.remote()
        return self._stop.requested


def _start_flag() -> Any:
    """An actor that workers can wait for; Tune only reaches a trial when it reports."""

    class Flag:  # local, so that its process does not import this module, and with it jax
        def __init__(self):
            self._is_up = asyncio.Event()

        async def up(self) -> None:
            self._is_up.set()

        async def wait(self) -> None:
            await self._is_up.wait()

    return ray.remote(num_cpus=0)(Flag).remote()


def _work(job: _Job, folder: str, flag: Any) -> None:
    """Trains, in a thread of the worker process, and reports to Tune how it ended."""
    if pathlib.Path(folder).is_dir():  # relative paths in the config are the driver's
        os.chdir(folder)
    with _logged(job.workdir):
        print(f"process {os.getpid()} on {platform.node()}", flush=True)
        try:
            report = _train(job, flag)
        except Diverged as error:
            report = _report("diverged", _one_line(error))
        except InUse as error:
            report = _report("interrupted", _one_line(error))
        except UserError as error:
            report = _report("failed", _one_line(error))
        except Exception:
            traceback.print_exc()
            raise
        if report["reason"]:
            print(report["reason"], flush=True)
    tune.report(report)


def _train(job: _Job, flag: Any) -> dict[str, Any]:
    kept.forget()  # the worker may have trained another trial
    config = configs.parse(job.config, devices=jax.device_count())
    metric, stop = config.best.metric, StopSignal()
    threading.Thread(target=_listen, args=(flag, stop), daemon=True).start()

    def on_evaluation(step: int, evaluated: dict[str, dict[str, float]]) -> None:
        judged = score(evaluated, config.best)
        if step < config.total_steps and judged is not None:  # returns when Tune has judged it, or never
            value = config.best.score(judged)  # as it is, whichever way is better
            tune.report({"step": step, "training_iteration": step, metric: value})

    if train(config, job.workdir, stop=stop, on_evaluation=on_evaluation).interrupted:
        return _report("interrupted")
    values = dict(Workdir(job.workdir).metrics.evaluations(metric))
    if config.total_steps not in values:  # it counts nobody
        return _report("done")
    return _report("done", step=config.total_steps, measured={metric: values[config.total_steps]})


def _listen(flag: Any, stop: StopSignal) -> None:
    with contextlib.suppress(RayError):  # without the flag, a signal just ends the worker unsaved
        ray.get(flag.wait.remote())
        stop.requested = True


def _report(
    status: str, reason: str = "", *, step: int | None = None, measured: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Any]:
    """The last report of a trial; without a step the scheduler ignores it."""
    at = {} if step is None else {"step": step, "training_iteration": step}
    return {"status": status, "reason": reason, **measured, "done": True, **at}


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())


@contextlib.contextmanager
def _logged(workdir: str) -> Iterator[None]:
    """Redirects output to log.txt; if the folder is remote, output stays in Ray's worker logs."""
    if "://" in workdir:
        yield
        return
    files.make_folder(workdir)
    with (
        io.TextIOWrapper(files.open_to_append(pathlib.Path(workdir) / "log.txt"), encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


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
