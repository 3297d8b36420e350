"""`lowrank sweep`: which engine runs the trials, or the text that has them run elsewhere."""

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lowrank_jax.experiment.cli.flags import JOBSET, RAY
from lowrank_jax.experiment.cli.output import say
from lowrank_jax.experiment.errors import DONE, FAILED, INTERRUPTED

if TYPE_CHECKING:
    from lowrank_jax.experiment.sweep.launch import Engine
    from lowrank_jax.experiment.sweep.trials import Sweep


def sweep(args: argparse.Namespace, lowrank: Callable[[Sequence[str]], NoReturn]) -> int:
    """Runs or prints the trials; `lowrank` is the command line, which trials run in child processes."""
    import jax

    from lowrank_jax.experiment.sweep import launch, trials

    _check_flags(args)
    jax.config.update("jax_platforms", "cpu")  # the accelerators are for the trials
    expanded = trials.expand(args.config, args.overrides, args.sweep, args.workdir)
    if args.dry_run:
        say(expanded.table())
        return DONE
    if args.emit:
        print(_emitted(args, expanded), end="")
        return DONE
    outcomes = launch.launch(expanded, args.workdir, _engine(args, expanded, lowrank), command=_command(args))
    say(launch.summary(outcomes))
    if launch.interrupted(outcomes):
        return INTERRUPTED
    return DONE if launch.succeeded(outcomes) else FAILED


def given(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """The values of those flags that the user has given."""
    return {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}


def _command(args: argparse.Namespace) -> str:
    return f"lowrank sweep {shlex.join(args.given)}"


def _check_flags(args: argparse.Namespace) -> None:
    from lowrank_jax.experiment.config.files import ConfigError

    ways = {"--engine=ray": (args.engine == "ray" and not args.emit, RAY), "--emit=jobset": (args.emit == "jobset", JOBSET)}
    problems = [
        f"--{flag.replace('_', '-')}: only with {way}"
        for way, (chosen, flags) in ways.items()
        for flag in given(args, flags)
        if not chosen
    ]
    if args.emit == "jobset":
        problems += [f"--{flag}: required with --emit=jobset" for flag in ("tpu", "image") if getattr(args, flag) is None]
    if args.emit:
        problems += [f"--{flag}: not with --emit" for flag in given(args, ("engine", "jobs"))]
    if args.asha_reduction is not None and args.asha_grace is None:
        problems.append("--asha-reduction: only with --asha-grace")
    if problems:
        raise ConfigError("sweep", problems)


def _engine(args: argparse.Namespace, expanded: "Sweep", lowrank: Callable[[Sequence[str]], NoReturn]) -> "Engine":
    if args.engine != "ray":
        from lowrank_jax.experiment.sweep import local

        return functools.partial(local.run, jobs=args.jobs or 1, lowrank=lowrank)
    from lowrank_jax.experiment.sweep import ray_tune
    from lowrank_jax.experiment.sweep.asha import Asha
    from lowrank_jax.experiment.sweep.ray_cluster import Resources

    asha = None
    if args.asha_grace is not None:
        grace = expanded.first[0].config.in_steps(args.asha_grace)
        asha = Asha(grace, **({"reduction": args.asha_reduction} if args.asha_reduction is not None else {}))
    resources = Resources(**given(args, ("cpus", "gpus", "tpus")))
    return functools.partial(ray_tune.run, address=args.ray_address, jobs=args.jobs, resources=resources, asha=asha, say=say)


def _emitted(args: argparse.Namespace, expanded: "Sweep") -> str:
    from lowrank_jax.experiment.config.files import ConfigError
    from lowrank_jax.experiment.sweep import emit, trials

    chosen = bool(expanded.later) and all(trials.known_outcome(trial) for trial in expanded.first)
    if expanded.later and not chosen:
        print("lowrank: printed the trials of the first seed; rerun this command when they have finished to print the rest",
              file=sys.stderr)  # fmt: skip
    wanted = expanded.chosen() if chosen else expanded.first
    try:
        text = emit.shell(wanted) if args.emit == "sh" else emit.jobset(wanted, emit.JobSetSettings(**given(args, JOBSET)))
    except ValueError as error:
        raise ConfigError(f"--emit={args.emit}", str(error).splitlines()) from None
    if "://" not in args.workdir:  # for the report; a bucket may be out of reach from here
        trials.record(args.workdir, expanded, wanted, _command(args))
    return text
