"""Runs from Python, as the command line has them: load a config, train, compress, evaluate, restore.

What the command line says in one line is raised as an exception with that text, in which a flag is an argument.
"""

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from lowrank_jax import named_code
from lowrank_jax.experiment import compression
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.cli import environment
from lowrank_jax.experiment.config.files import Overrides
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.config.trust import Trust, UntrustedCode
from lowrank_jax.experiment.data import decode, kept
from lowrank_jax.experiment.errors import UserError, ended_python, of_files
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.evaluation.results import Evaluation
from lowrank_jax.experiment.evaluation.trained import TrainedNetwork
from lowrank_jax.experiment.evaluation.trained import restore as restore_network
from lowrank_jax.experiment.memory import exhausted
from lowrank_jax.experiment.training import loop
from lowrank_jax.experiment.training.stop import StopSignal
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.text import shown

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, as `train` leaves it.

    Attributes:
      workdir: its folder.
      interrupted: it was stopped and saved before its end; `train` on the same folder goes on from there.
      step: how far it is.
      metrics: of its last evaluation on `dataset.eval_split`; empty if there was none yet.
      best_step: the step of the best checkpoint; None if none was evaluated.
      evals, train: what this process has evaluated on `dataset.eval_split`, and logged of training, by step.
      result: the contents of result.json; None if the run was interrupted.
    """

    workdir: str
    interrupted: bool
    step: int
    metrics: dict[str, float]
    best_step: int | None
    evals: dict[int, dict[str, float]] = dataclasses.field(repr=False)
    train: dict[int, dict[str, float]] = dataclasses.field(repr=False)
    result: dict[str, Any] | None = dataclasses.field(repr=False)


def _begin() -> None:
    """What was read before is looked at anew: between two calls, as in a notebook, data and code may change."""
    kept.forget()
    named_code.forget_changed()
    decode.pool.cache_clear()  # an earlier call may have left all of its threads waiting for data that does not come


def load_config(config: Path | ConfigDict, overrides: Overrides = ()) -> Config:
    """Loads a config, with some values replaced by dotted key, and checks all of it.

    Args:
      config: what `--config` takes, or what a config file's `get_config` returned.
      overrides: such as `{"lowrank.scale": 0.1, "epochs": 5}`.

    Raises:
      ConfigError: with all problems.
    """
    _begin()
    with _explained():
        if not isinstance(config, str | os.PathLike | ConfigDict):
            raise UserError(f"load_config takes a path, a name or a ConfigDict, not a {type(config).__name__}")
        _check_overrides(overrides)
        with environment.modes_kept():
            return configs.read(config if isinstance(config, ConfigDict) else str(os.fspath(config)), overrides)


def _check_overrides(overrides: Any) -> None:
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else overrides
    named = isinstance(pairs, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    if not named or not all(isinstance(key, str) for key, _ in pairs):
        raise UserError(f'overrides are values by dotted key, such as {{"lowrank.scale": 0.1}}, not {shown(overrides)}')


def train(config: Config, workdir: Path, *, restart: bool = False, extend: bool = False, schedule: str | None = None) -> Run:
    """Trains until the end, or resumes a run that was stopped; progress is printed.

    Ctrl-C, SIGTERM and SIGHUP stop it after saving, if this is called in the main thread: it returns with `interrupted`.  What
    is being compiled is compiled first, and data that does not come is waited for no longer than ten seconds, which end in a
    KeyboardInterrupt if there is no state to save yet.  A second Ctrl-C is one at once, and nothing is saved.

    Args:
      config: from `load_config`.
      workdir: its folder, local or remote; that of `compress`, too, with the same config.
      restart: begin anew if the run was saved and its checkpoints are gone.
      extend, schedule: make a run that has finished longer, as `--extend` and `--schedule` do.

    Raises:
      ConfigError, WorkdirError, DataError, CheckpointError: it cannot start; the message says why.
      Diverged: the loss, or the gradient, is not finite.
      UserError: a file cannot be read or written, memory ran out, or the user's own code ended Python.
    """
    if schedule not in (None, "restart", "constant"):
        raise UserError(f"schedule={shown(schedule)} must be restart or constant")
    workdir = _path("workdir", workdir)
    _begin()
    # From the beginning: a KeyboardInterrupt is lost where a library's callback happens to be running, as it does in compiling.
    with _explained(), StopSignal() as stop:
        with stop.waiting_for_data(saved=False):  # the data is looked at
            checked = configs.parse(configs.to_dict(_a_config(config)), devices=jax.device_count())
        trained = loop.train(checked, workdir, restart=restart, extend=extend, schedule=schedule, stop=stop)
        folder = Workdir(workdir)
        with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
            best = checkpoints.best()
        result = None if trained.interrupted else folder.read_json("result.json")
    last = trained.evals[max(trained.evals)] if trained.evals else {}
    metrics = result["eval"] if result else last
    step = int(trained.state.step)
    return Run(workdir, trained.interrupted, step, metrics, best, trained.evals, trained.train, result)


def compress(
    config: Path | ConfigDict | Config, workdir: Path, overrides: Overrides = (), *, restart: bool = False
) -> compression.Compression:
    """Makes a trained network low-rank at once, measures what is lost, and saves it as step 0 of a run; progress is printed.

        budget = {"init.weights": "runs/dense@best", "lowrank.budget.macs": 0.5}
        made = lx.compress("digits_resnet", "runs/half", budget)
        print(made)
        lx.train(made.config, made.workdir)

    Ctrl-C ends it at once, in a KeyboardInterrupt; the same call begins again.

    Args:
      config: what `load_config` takes, in which the method `two_sided` and the like are set unless the overrides say otherwise,
        as `lowrank compress` does; or a config from `load_config`, which is taken as it is.
      workdir: the new run's folder, local or remote.
      overrides: of a config that is loaded here, such as `{"init.weights": "runs/dense"}`.
      restart: begin anew if the run was saved and its checkpoints are gone.

    Raises:
      ConfigError, WorkdirError, DataError, CheckpointError: it cannot be done; the message says why.
      UserError: the run was trained on already, or as for `train`.
    """
    workdir = _path("workdir", workdir)
    if isinstance(config, Config):
        if list(overrides):
            raise UserError("overrides are for a config that is loaded here; give them to load_config")
    else:
        config = _loaded_to_compress(config, overrides)
    _begin()
    with _explained():
        checked = configs.parse(configs.to_dict(config), devices=jax.device_count())
        return compression.compress(checked, workdir, restart=restart)


def _loaded_to_compress(config: Path | ConfigDict, overrides: Overrides) -> Config:
    named = str(os.fspath(config)) if isinstance(config, str | os.PathLike) else config
    _begin()
    with _explained():
        if not isinstance(named, str | ConfigDict):
            raise UserError(f"compress takes a path, a name, a ConfigDict or a config, not a {type(config).__name__}")
        _check_overrides(overrides)
        with environment.modes_kept():
            overrides = compression.with_defaults(named, overrides)
    return load_config(named, overrides)


def evaluate(
    workdir: Path,
    step: int | str = "latest",
    *,
    split: str | None = None,
    data_dir: str | None = None,
    dataset: str | None = None,
    max_undecodable: int | None = None,
    trust_code: Trust = False,
    against: Path | None = None,
) -> Evaluation:
    """Evaluates a checkpoint on every example of a split, and counts what each class is taken for.

        evaluation = lx.evaluate("runs/low", against="runs/dense@best")
        print(evaluation.fidelity)

    Args:
      workdir: of the run.
      step: "latest", "best" or a step's number.
      split, data_dir, dataset, max_undecodable, trust_code, against: as in `Evaluator`.

    Raises:
      WorkdirError, ConfigError, DataError, CheckpointError: something that is needed cannot be used; the message says why.
      UntrustedCode: the run's config names code that is not trusted.
    """
    workdir = _path("workdir", workdir)
    evaluator = Evaluator(
        split=None if split is None else _path("split", split),
        data_dir=None if data_dir is None else _path("data_dir", data_dir),
        dataset=None if dataset is None else _path("dataset", dataset),
        max_undecodable=max_undecodable,
        trust_code=trust_code,
        classes=True,
        against=None if against is None else _path("against", against),
    )
    _begin()
    with _explained():
        evaluation = evaluator.evaluate(workdir, str(step))
    for line in evaluation.warnings():
        warnings.warn(f"{workdir}: {line}", stacklevel=2)
    return evaluation


def restore(workdir: Path, step: int | str = "latest", *, raw: bool = False, trust_code: Trust = False) -> TrainedNetwork:
    """The network of a run, ready to be called on images; from self-guided training, the low-rank one alone.

    Args:
      workdir: of the run.
      step: "latest", "best" or a step's number.
      raw: the weights themselves, where the run keeps an average.
      trust_code: what the run's config may have imported, as in `Evaluator`.

    Raises:
      WorkdirError, ConfigError, CheckpointError: the run cannot be read; the message says why.
      UntrustedCode: the run's config names code that is not trusted.
    """
    workdir = _path("workdir", workdir)
    _begin()
    with _explained():
        network = restore_network(workdir, str(step), raw=raw, trust_code=trust_code)
    for line in network.warnings():
        warnings.warn(f"{workdir}: {line}", stacklevel=2)
    return network


def _path(name: str, value: Any) -> str:
    """An argument that is a path, or another text; an empty one, as of a variable that is not set, means no place."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise UserError(f"{name}={shown(value)} must be text or a path")
    if not os.fspath(value):
        raise UserError(f"{name} is empty; name one")
    return os.fspath(value)


def _a_config(config: Any) -> Config:
    if not isinstance(config, Config):
        raise UserError(f"train takes a config from load_config, not a {type(config).__name__}")
    return config


_ARGUMENTS = {
    "--extend": "extend=True",
    "--restart": "restart=True",
    "--schedule": "schedule",
    "--workdir": "workdir",
    "--split": "split",
    "--dataset": "dataset",
    "--data-dir": "data_dir",
    "--against": "against",
}
_FLAG = re.compile(rf"(?<!evaluate )({'|'.join(_ARGUMENTS)})(?![\w-])")  # but where a command is quoted


def _of_arguments(text: str) -> str:
    """A message with the arguments of `train` and `evaluate` for their flags."""
    return _FLAG.sub(lambda flag: _ARGUMENTS[flag[0]], text)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What the command line has one line for is raised as a UserError with that text; accidents are raised as they are."""
    environment.quiet()
    environment.check_modes()
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except UserError as error:
        error.args = tuple(_of_arguments(text) for text in error.args)
        if isinstance(error, UntrustedCode):
            error.args = (f"{error} To import it: trust_code={[*error.names]!r}",)
        if isinstance(error, configs.ConfigError):
            error.problems = [_of_arguments(problem) for problem in error.problems]
        raise
    except OSError as error:
        raise UserError(of_files(error)) from error
    except Exception as error:
        if message := exhausted(error):
            raise UserError(message) from error
        raise
    except BaseException as error:
        raise UserError(ended_python(error)) from error
