"""The command line.

`lowrank train | compress | evaluate | predict | sweep | report | overview | preflight | configs | new | init-report`.

jax and whatever needs it are imported by the command that runs, so that help and a mistyped flag are answered at once.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.cli import configs, environment, extras, version
from lowrank_jax.experiment.cli.flags import HOSTS, parser, split_overrides
from lowrank_jax.experiment.cli.new import new
from lowrank_jax.experiment.cli.output import Output, complain, hush, print_anything, say, written_at_the_end
from lowrank_jax.experiment.cli.sweep import given, sweep
from lowrank_jax.experiment.errors import (
    BAD_INPUT,
    DIVERGED,
    DOES_NOT_FIT,
    DONE,
    FAILED,
    INTERRUPTED,
    UserError,
    ended_python,
    of_files,
)
from lowrank_jax.experiment.workdir import files
from lowrank_jax.text import first_line, one_line

if TYPE_CHECKING:
    from lowrank_jax.experiment.config.schema import Config
    from lowrank_jax.experiment.evaluation.evaluator import Evaluator
    from lowrank_jax.experiment.evaluation.results import Evaluation
    from lowrank_jax.experiment.preflight.networks import Network


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with its status."""
    print_anything()
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides, rest = split_overrides(arguments)
    args = parser(_COMMANDS, version.show).parse_args(rest)
    args.overrides, args.given = overrides, arguments[1:]
    status = _status(args)
    interrupts.too_late(status)
    sys.exit(status)


def _status(args: argparse.Namespace) -> int:
    """Runs a command; an extra of the package that is not installed is told in one line."""
    if args.overrides and not hasattr(args, "config"):
        complain(f"lowrank: --config.{args.overrides[0][0]}: this command takes no config; remove it")
        return BAD_INPUT
    if args.command in _LIGHT:
        return _run_light(args)
    try:
        return _run(args) if _prepare() else BAD_INPUT
    except ImportError as error:
        if not (message := extras.missing(error)):
            raise
        return _failed(BAD_INPUT, f"lowrank: {message}")


def _prepare() -> bool:
    """Whether jax can be used."""
    try:
        environment.prepare()
    except ValueError as error:  # a setting in the environment that jax does not understand
        complain(f"lowrank: jax cannot start: {first_line(error)}")
        return False
    except UserError as error:
        complain(str(error))
        return False
    return True


def _run_light(args: argparse.Namespace) -> int:
    """Runs a command that needs neither jax nor an extra."""
    try:
        return args.command(args)
    except UserError as error:
        complain(str(error))
    except OSError as error:
        complain(f"lowrank: {of_files(error)}")
    return BAD_INPUT


def _run(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment.hosts.processes import OtherFailed, end_with_the_others, several
    from lowrank_jax.experiment.memory import exhausted
    from lowrank_jax.experiment.training.log_window import Diverged

    try:
        return args.command(args)
    except UserError as error:
        return _failed(BAD_INPUT, str(error))
    except OSError as error:
        return _failed(BAD_INPUT, f"lowrank: {of_files(error)}")
    except Diverged as error:
        return _failed(DIVERGED, str(error))
    except OtherFailed:
        end_with_the_others(FAILED)
    except Exception as error:
        if message := exhausted(error):
            return _failed(FAILED, f"lowrank: {message}")
        if isinstance(error, ImportError) and (message := extras.missing(error)):
            return _failed(BAD_INPUT, f"lowrank: {message}")
        if not several():
            raise
        return _failed(FAILED, _accident(error))  # the others must not wait for this process
    except BaseException as error:  # of the user's code: no command raises one, and signals end it without
        if isinstance(error, KeyboardInterrupt) and not interrupts.obeyed():
            raise  # Ctrl-C in a program that calls this one
        return _failed(BAD_INPUT, f"lowrank: {ended_python(error)}")


def _accident(error: Exception) -> str:
    """What happened to one of several processes."""
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        again = "If a process was lost, run the same command on every host again; it resumes from the last checkpoint."
        return f"lowrank: the devices failed: {first_line(error)}. {again}"
    return "".join(traceback.format_exception(error))


def _failed(status: int, message: str) -> int:
    from lowrank_jax.experiment.hosts.processes import end_all, several

    if several():
        end_all(status, message)
    complain(message)
    return status


def _train(args: argparse.Namespace) -> int:
    import jax

    from lowrank_jax.experiment.training.loop import train

    _join(args)
    config = _config(args, devices=jax.device_count())
    result = train(config, args.workdir, source=args.config, restart=args.restart, extend=args.extend, schedule=args.schedule)
    return INTERRUPTED if result.interrupted else DONE


def _compress(args: argparse.Namespace) -> int:
    import jax

    from lowrank_jax.experiment.compression import compress, with_defaults

    _join(args)
    first = jax.process_index() == 0
    with environment.modes_kept():
        args.overrides = with_defaults(args.config, args.overrides)
    with written_at_the_end(args.json if first else None) as output:
        config = _config(args, devices=jax.device_count())
        made = compress(config, args.workdir, source=args.config, restart=args.restart)
        output.write(made.json())
    if first:
        flags = [f"--config.{key}={value}" for key, value in args.overrides]
        train = shlex.join(["lowrank", "train", f"--config={args.config}", *flags, f"--workdir={args.workdir}"])
        say(f"{made}\n\nto train it on: {train}")
    return DONE


def _evaluate(args: argparse.Namespace) -> int:
    import jax

    from lowrank_jax.experiment.config.trust import UntrustedCode
    from lowrank_jax.experiment.evaluation.evaluator import Evaluator
    from lowrank_jax.experiment.workdir.beside_runs import runs_among

    _check_devices() if args.watch else _join(args)
    trusted = args.trust_code or []
    evaluator = Evaluator(
        **given(args, ("split", "data_dir", "dataset", "max_undecodable", "against")),
        trust_code=True in trusted or trusted,
        classes=bool(args.classes or args.confusion or args.json),
    )
    workdirs = runs_among(args.workdir, written=(args.json, args.confusion))
    try:
        status = (_watch if args.watch else _evaluate_now)(args, workdirs, evaluator)
    except UntrustedCode as error:  # of the only work directory
        raise UserError(f"{error}\n{_with_trust(args, error.names)}") from None
    if evaluator.untrusted and jax.process_index() == 0:
        complain(_with_trust(args, evaluator.untrusted))
    return status


def _with_trust(args: argparse.Namespace, names: Iterable[str]) -> str:
    """The command again, with trust in these names."""
    flags = [f"--trust-code={name}" for name in names]
    return f"To import it: {shlex.join(['lowrank', args.called, *args.given, *flags])}"


def _predict(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment.cli.predict import predict
    from lowrank_jax.experiment.config.trust import UntrustedCode

    _check_devices()
    try:
        return predict(args)
    except UntrustedCode as error:
        raise UserError(f"{error}\n{_with_trust(args, error.names)}") from None


def _evaluate_now(args: argparse.Namespace, workdirs: list[str], evaluator: "Evaluator") -> int:
    import jax

    from lowrank_jax.experiment.evaluation.evaluator import evaluate_all
    from lowrank_jax.experiment.evaluation.results import as_json

    first = jax.process_index() == 0
    if args.classes or args.confusion:
        _check_classes(args, workdirs, evaluator)
    with written_at_the_end(args.json if first else None) as output:
        if len(workdirs) == 1:
            with written_at_the_end(args.confusion if first else None) as picture:
                result = evaluator.evaluate(workdirs[0], args.step)
                if first:
                    say(result.table())
                    _show_classes(args, result, picture)
            done, text = [result], result.json()
        else:
            done = evaluate_all(workdirs, evaluator, args.step, say=say if first else hush, complain=complain)
            text = as_json([{"workdir": workdir, **result.record()} for workdir, result in done.items()])
        output.write(text)
    return DONE if len(done) == len(workdirs) else BAD_INPUT


def _check_classes(args: argparse.Namespace, workdirs: list[str], evaluator: "Evaluator") -> None:
    """Whether there are classes to show, before the work begins."""
    from lowrank_jax.experiment.evaluation import classes, confusion_picture

    flag = "--classes" if args.classes else "--confusion"
    if len(workdirs) > 1:
        raise UserError(f"{flag} shows one run; name one --workdir, or write what is counted of all of them by --json=FILE")
    if args.confusion:
        confusion_picture.check_name(args.confusion)
    experiment = evaluator.open(workdirs[0]).experiment
    classes.check(experiment.config, experiment.dataset)


def _show_classes(args: argparse.Namespace, result: "Evaluation", picture: Output) -> None:
    from lowrank_jax.experiment.evaluation import confusion_picture

    if args.classes:
        say(f"\n{result.tables_of_classes()}")
    if args.confusion:
        picture.write(confusion_picture.draw(result.counted(), pathlib.Path(args.confusion).suffix))
        say(args.confusion)


def _watch(args: argparse.Namespace, workdirs: list[str], evaluator: "Evaluator") -> int:
    from lowrank_jax.experiment.config.files import ConfigError
    from lowrank_jax.experiment.evaluation.watch import watch

    if flags := given(args, HOSTS):
        raise ConfigError("--watch", [f"runs as a single process; remove {' '.join(f'--{flag}' for flag in flags)}"])
    if args.json or args.step != "latest":
        raise ConfigError("--watch", ["evaluates every checkpoint and writes a file of its own; remove --step and --json"])
    if args.classes or args.confusion:
        raise ConfigError("--watch", ["counts no classes; remove --classes and --confusion"])
    if args.against:
        raise ConfigError("--watch", ["compares no networks; remove --against"])
    outcome = watch(workdirs, evaluator, poll=args.poll, say=say, complain=complain)
    if outcome.interrupted:
        return INTERRUPTED
    return BAD_INPUT if outcome.failed else DONE


def _join(args: argparse.Namespace) -> None:
    from lowrank_jax.experiment.hosts import processes

    processes.start(processes.ProcessOptions(**given(args, HOSTS)))
    _check_devices()


def _check_devices() -> None:
    """Raises UserError if jax finds no device to compute on."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        chosen = os.environ.get("JAX_PLATFORMS")
        reason = (first_line(error) if str(error) else "") or f"nothing here is JAX_PLATFORMS={chosen}"
        raise UserError(f"lowrank: jax has no device to compute on: {reason}") from None


def _sweep(args: argparse.Namespace) -> int:
    return sweep(args, main)


def _report(args: argparse.Namespace) -> int:
    from lowrank_jax.experiment.report.page import Report
    from lowrank_jax.experiment.workdir.beside_runs import runs_among

    folders = runs_among(args.folders)
    report = Report(folders, rival=args.rival, tune=args.tune)
    paths = report.write(args.out or folders[0])
    say(report.console())
    say("\n".join(map(one_line, paths)))
    return DONE


def _overview(args: argparse.Namespace) -> int:
    import jax

    from lowrank_jax.experiment.training.overview import overview

    jax.config.update("jax_platforms", "cpu")  # not even to look: another process may hold the accelerators
    with written_at_the_end(args.picture) as picture:
        devices = args.devices or _config(args).mesh.least_devices
        config = _config(args, devices=devices)
        say(overview(config, devices, args.config))
        if args.picture:
            picture.write(_budget_picture(config, args.picture))
            say(args.picture)
    return DONE


def _budget_picture(config: "Config", path: str) -> bytes:
    from lowrank_jax.experiment.report import budget_curves

    return budget_curves.draw(budget_curves.budget_curves(config), config.model.name, pathlib.Path(path).suffix)


def _preflight(args: argparse.Namespace) -> int:
    import jax

    from lowrank_jax.experiment.preflight.cache import Cache
    from lowrank_jax.experiment.preflight.run import run

    jax.config.update("jax_platforms", "cpu")  # accelerators of this machine may be in use, and are not what is asked about
    with written_at_the_end(args.json) as output:
        estimates = run(
            _networks(args),
            args.topology,
            source=args.config,
            effort=args.effort,
            cache=Cache(None if args.no_cache else environment.cache_home() / "preflight"),
            say=complain,
        )
        say(str(estimates))
        output.write(estimates.json())
    return DONE if estimates.fits else DOES_NOT_FIT


def _networks(args: argparse.Namespace) -> "list[Network]":
    from lowrank_jax.experiment.preflight.networks import Network, named
    from lowrank_jax.experiment.sweep import trials

    if args.sweep:
        expanded = trials.expand(args.config, args.overrides, args.sweep, "preflight")
        return [Network(trial.name, trial.config) for trial in expanded.first]
    return [named(_config(args))]


def _init_report(args: argparse.Namespace) -> int:
    import jax

    from lowrank_jax.experiment.report import before_training, before_training_page
    from lowrank_jax.text import align

    _check_devices()
    config = _config(args)
    settings = before_training.Settings(**given(args, ("scales", "methods", "seeds", "images", "batch_size")))
    settings.check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # compilation times are part of the report
    files.make_folder(pathlib.Path(args.out).parent)
    with contextlib.ExitStack() as stack:
        for suffix in before_training_page.SUFFIXES:
            stack.enter_context(written_at_the_end(f"{args.out}.{suffix}"))
        measured = before_training.compare(config, settings, say=say)
        say(align(before_training_page.summary(measured)))
        command = f"lowrank init-report {shlex.join(args.given)}"
        paths = before_training_page.write(measured, args.out, command=command, config=config, settings=settings)
    say("\n".join(one_line(str(path)) for path in paths))
    return DONE


def _config(args: argparse.Namespace, devices: int | None = None) -> "Config":
    from lowrank_jax.experiment import config

    with environment.modes_kept():
        return config.read(args.config, args.overrides, devices=devices)


def _configs(args: argparse.Namespace) -> int:
    return configs.copy(args.copy, args.folder) if args.copy else configs.list_all()


_COMMANDS = {
    "train": _train,
    "compress": _compress,
    "evaluate": _evaluate,
    "predict": _predict,
    "sweep": _sweep,
    "report": _report,
    "overview": _overview,
    "preflight": _preflight,
    "configs": _configs,
    "new": new,
    "init-report": _init_report,
}
_LIGHT = (_configs, new)
