"""The command line: `lowrank train | evaluate | sweep | report | overview | preflight | init-report`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
from absl import logging

from lowrank_jax.experiment.cli.flags import (
    BAD_INPUT,
    DIVERGED,
    DOES_NOT_FIT,
    FAILED,
    HOSTS,
    INTERRUPTED,
    JOBSET,
    KILLED,
    RAY,
    parser,
    split_overrides,
)
from lowrank_jax.text import first_line

if TYPE_CHECKING:
    from lowrank_jax.experiment.evaluation.runs import Evaluator
    from lowrank_jax.experiment.preflight.networks import Network
    from lowrank_jax.experiment.sweep.launch import Engine
    from lowrank_jax.experiment.sweep.trials import Sweep


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with its status."""
    given = list(sys.argv[1:] if argv is None else argv)
    overrides, rest = split_overrides(given)
    args = parser(_COMMANDS).parse_args(rest)
    args.overrides, args.given = overrides, given[1:]
    _quieten()
    try:
        sys.exit(_run(args))
    except KeyboardInterrupt:
        sys.exit(_failed(KILLED, "lowrank: interrupted"))


def _run(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment.config.files import ConfigError
    from lowrank_jax.experiment.data.base import DataError
    from lowrank_jax.experiment.hosts.processes import ClusterError, OtherFailed, end_with_the_others, several
    from lowrank_jax.experiment.preflight.compiler import PreflightError
    from lowrank_jax.experiment.training.window import Diverged
    from lowrank_jax.experiment.workdir.checkpoint import CheckpointError
    from lowrank_jax.experiment.workdir.workdir import WorkdirError

    try:
        return args.command(args)
    except (ConfigError, WorkdirError, DataError, CheckpointError, ClusterError, PreflightError) as error:
        return _failed(BAD_INPUT, str(error))
    except OSError as error:  # no such folder, no permission, no space left
        return _failed(BAD_INPUT, f"lowrank: {error.filename or 'input or output'}: {error.strerror or error}")
    except Diverged as error:
        return _failed(DIVERGED, str(error))
    except OtherFailed:
        end_with_the_others(FAILED)
    except Exception as error:
        if not several():
            raise
        return _failed(FAILED, _accident(error))  # the others must not wait for this process


def _accident(error: Exception) -> str:
    """What became of one of several processes."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        again = "If a process was lost, the same command on each goes on from the last save."
        return f"lowrank: the devices failed: {first_line(error)}. {again}"
    return "".join(traceback.format_exception(error))


def _failed(status: int, message: str) -> int:
    from lowrank_jax.experiment.hosts.processes import end_all, several

    if several():
        end_all(status, message)
    print(message, file=sys.stderr)
    return status


def _train(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment import config as configs
    from lowrank_jax.experiment.training.loop import train

    _join(args)
    source, loaded = _load(args)
    config = configs.parse(loaded, source=source, devices=jax.device_count())
    return INTERRUPTED if train(config, args.workdir, source=source).interrupted else 0


def _evaluate(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment.evaluation.runs import Evaluator, evaluate_all

    if not args.watch:
        _join(args)
    evaluator = Evaluator(split=args.split, data_dir=args.data_dir, dataset=args.dataset, max_undecodable=args.max_undecodable)
    workdirs = list(dict.fromkeys(args.workdir))
    if args.watch:
        return _watch(args, workdirs, evaluator)
    first = jax.process_index() == 0
    with _written_in_the_end(args.json if first else None) as output:
        if len(workdirs) == 1:
            result = evaluator.evaluate(workdirs[0], args.step)
            if first:
                print(result.table())
            done, text = [result], result.json()
        else:
            done = evaluate_all(workdirs, evaluator, args.step, say=_say if first else _hush, complain=_complain)
            objects = [{"workdir": workdir, **dataclasses.asdict(result)} for workdir, result in done.items()]
            text = json.dumps(objects, indent=2) + "\n"
        output.write(text)
    return 0 if len(done) == len(workdirs) else BAD_INPUT


def _watch(args: argparse.Namespace, workdirs: list[str], evaluator: "Evaluator") -> int:
    from lowrank_jax.experiment.config.files import ConfigError
    from lowrank_jax.experiment.evaluation.watch import watch

    if flags := _given(args, HOSTS):
        raise ConfigError("--watch", [f"it is one process: leave out {' '.join(f'--{flag}' for flag in flags)}"])
    if args.json or args.step != "latest":
        raise ConfigError("--watch", ["it evaluates every checkpoint into a file of its own: leave out --step and --json"])
    outcome = watch(workdirs, evaluator, poll=args.poll, say=_say, complain=_complain)
    if outcome.interrupted:
        return INTERRUPTED
    return BAD_INPUT if outcome.failed else 0


def _join(args: argparse.Namespace) -> None:
    from lowrank_jax.experiment.hosts import processes

    processes.start(processes.Cluster(**_given(args, HOSTS)))


def _say(text: str) -> None:
    print(text, flush=True)


def _hush(text: str) -> None:
    """For what another process says."""


def _complain(text: str) -> None:
    print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece, whatever other threads say


@dataclasses.dataclass(frozen=True)
class _Output:
    """A file that is written after long work, if there is one: that it cannot be written is found out before."""

    path: pathlib.Path | None
    new: bool

    def write(self, text: str) -> None:
        if self.path:
            self.path.write_text(text)

    def give_up(self) -> None:
        """Leaves what was there."""
        if self.path and self.new:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _written_in_the_end(name: str | None) -> Iterator[_Output]:
    """A file for what comes of long work; work that fails leaves what was there."""
    output = _Output(path := pathlib.Path(name) if name else None, new=path is not None and not path.exists())
    if path:
        path.open("a").close()
    try:
        yield output
    except BaseException:
        output.give_up()
        raise


def _sweep(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment.sweep import launch, trials

    _check_sweep_flags(args)
    jax.config.update("jax_platforms", "cpu")  # the accelerators are for the trials
    sweep = trials.expand(args.config, args.overrides, args.sweep, args.workdir)
    if args.dry_run:
        print(sweep.table())
        return 0
    if args.emit:
        print(_emitted(args, sweep), end="")
        return 0
    outcomes = launch.launch(sweep, args.workdir, _engine(args, sweep), command=f"lowrank sweep {shlex.join(args.given)}")
    print(launch.summary(outcomes))
    if launch.interrupted(outcomes):
        return INTERRUPTED
    return 0 if launch.succeeded(outcomes) else FAILED


def _check_sweep_flags(args: argparse.Namespace) -> None:
    from lowrank_jax.experiment.config.files import ConfigError

    ways = {"--engine=ray": (args.engine == "ray" and not args.emit, RAY), "--emit=jobset": (args.emit == "jobset", JOBSET)}
    problems = [
        f"--{flag.replace('_', '-')}: only with {way}"
        for way, (chosen, flags) in ways.items()
        for flag in flags
        if getattr(args, flag) is not None and not chosen
    ]
    if args.emit == "jobset":
        problems += [f"--{flag}: needed with --emit=jobset" for flag in ("tpu", "image") if getattr(args, flag) is None]
    if args.emit:
        problems += [f"--{flag}: not with --emit" for flag in ("engine", "jobs") if getattr(args, flag) is not None]
    if args.asha_reduction is not None and args.asha_grace is None:
        problems.append("--asha-reduction: only with --asha-grace")
    if problems:
        raise ConfigError("sweep", problems)


def _given(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    return {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}


def _engine(args: argparse.Namespace, sweep: "Sweep") -> "Engine":
    if args.engine != "ray":
        from lowrank_jax.experiment.sweep import local

        return functools.partial(local.run, jobs=args.jobs or 1)
    from lowrank_jax.experiment.sweep import ray_tune
    from lowrank_jax.experiment.sweep.asha import Asha
    from lowrank_jax.experiment.sweep.ray_cluster import Resources

    asha = None
    if args.asha_grace is not None:
        grace = sweep.first[0].config.in_steps(args.asha_grace)
        asha = Asha(grace, **({"reduction": args.asha_reduction} if args.asha_reduction is not None else {}))
    resources = Resources(**_given(args, ("cpus", "gpus", "tpus")))
    return functools.partial(ray_tune.run, address=args.ray_address, jobs=args.jobs, resources=resources, asha=asha, say=_say)


def _emitted(args: argparse.Namespace, sweep: "Sweep") -> str:
    from lowrank_jax.experiment.config.files import ConfigError
    from lowrank_jax.experiment.sweep import emit, trials

    chosen = bool(sweep.later) and all(trials.known_outcome(trial) for trial in sweep.first)
    if sweep.later and not chosen:
        print("lowrank: the trials at the first seed; when they are done, the same command gives the others", file=sys.stderr)
    wanted = sweep.chosen() if chosen else sweep.first
    if "://" not in args.workdir:  # for the report; a bucket may be out of reach from here
        trials.record(args.workdir, sweep, wanted, f"lowrank sweep {shlex.join(args.given)}")
    try:
        return emit.shell(wanted) if args.emit == "sh" else emit.jobset(wanted, emit.JobSetSettings(**_given(args, JOBSET)))
    except ValueError as error:
        raise ConfigError(f"--emit={args.emit}", str(error).splitlines()) from None


def _report(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment.report.page import Report

    report = Report(args.folders, rival=args.rival, tune=args.tune)
    paths = report.write(args.out or args.folders[0])
    print(report.console())
    print("\n".join(paths))
    return 0


def _overview(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment import config as configs
    from lowrank_jax.experiment.training.overview import overview

    jax.config.update("jax_platforms", "cpu")  # not even to look at: another process may hold the accelerators
    source, loaded = _load(args)
    devices = args.devices or configs.parse(loaded, source=source).mesh.least_devices
    print(overview(configs.parse(loaded, source=source, devices=devices), devices, source))
    return 0


def _preflight(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment.preflight.cache import Cache
    from lowrank_jax.experiment.preflight.run import run

    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine may be in use, and is not what is asked about
    with _written_in_the_end(args.json) as output:

        def end(*_: object) -> None:
            # Here rather than by an exception, which is lost where Python is in a callback, and waits for the compiler.
            output.give_up()
            _complain("lowrank: interrupted")
            os._exit(KILLED)

        signal.signal(signal.SIGINT, end)
        estimates = run(
            _networks(args),
            args.topology,
            source=args.config,
            effort=args.effort,
            cache=Cache(None if args.no_cache else cache_home() / "preflight"),
            say=_complain,
        )
        print(estimates)
        output.write(estimates.json())
    return 0 if estimates.fits else DOES_NOT_FIT


def _networks(args: argparse.Namespace) -> "list[Network]":
    from lowrank_jax.experiment import config as configs
    from lowrank_jax.experiment.preflight.networks import Network
    from lowrank_jax.experiment.sweep import trials

    if args.sweep:
        sweep = trials.expand(args.config, args.overrides, args.sweep, "preflight")
        return [Network(trial.name, trial.config) for trial in sweep.first]
    source, loaded = _load(args)
    config = configs.parse(loaded, source=source)
    low = config.lowrank
    size = f"scale={low.scale:g}" if low.scale is not None else f"rank={low.rank}"
    return [Network("dense" if low.method == "none" else size, config)]


def _init_report(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment import config as configs
    from lowrank_jax.experiment.report import before_training, before_training_page
    from lowrank_jax.text import align

    source, loaded = _load(args)
    config = configs.parse(loaded, source=source)
    given = {name: getattr(args, name) for name in ("scales", "methods", "seeds", "images", "batch_size")}
    settings = before_training.Settings(**{name: value for name, value in given.items() if value is not None})
    settings.check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # what compilation takes is part of the report
    first = pathlib.Path(f"{args.out}.md")
    first.parent.mkdir(parents=True, exist_ok=True)
    first.touch()  # rather now than after all of it
    measured = before_training.compare(config, settings, say=_say)
    print(align(before_training_page.summary(measured)))
    command = f"lowrank init-report {shlex.join(args.given)}"
    for path in before_training_page.write(measured, args.out, command=command, config=config, settings=settings):
        print(path)
    return 0


def _load(args: argparse.Namespace):
    from lowrank_jax.experiment import config as configs

    config = configs.load(args.config)
    for key, text in args.overrides:
        configs.override(config, key, text)
    return args.config, config


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "sweep": _sweep,
    "report": _report,
    "overview": _overview,
    "preflight": _preflight,
    "init-report": _init_report,
}


def _quieten() -> None:
    """Libraries' start-up chatter off; a compilation cache on, unless the user has chosen one."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.set_verbosity(logging.ERROR)
    if not (list(pathlib.Path("/dev").glob("accel*")) or list(pathlib.Path("/dev/vfio").glob("[0-9]*"))):
        # There is no TPU, but where its compiler is installed jax loads it, and it complains of what it cannot find out.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # jax has read its environment by now, so it has to be told
        jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def cache_home() -> pathlib.Path:
    """Where the project keeps what can be made again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "lowrank_jax"
