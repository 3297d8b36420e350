"""The command line: `lowrank train | evaluate | sweep | report | overview | preflight | init-report`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
from absl import logging

from lowrank_jax.messages import first_line

if TYPE_CHECKING:
    from lowrank_jax.estimates import Wanted
    from lowrank_jax.evaluate import Evaluator
    from lowrank_jax.sweep.launch import Engine
    from lowrank_jax.sweep.trials import Sweep

FAILED, BAD_INPUT, DOES_NOT_FIT, DIVERGED, INTERRUPTED, KILLED = 1, 2, 3, 4, 75, 130

_HOSTS = ("coordinator", "processes", "process", "heartbeat", "patience")

_STATUS = f"""exit status:
  0  done
  {FAILED}  some trials of a sweep did not succeed
  {BAD_INPUT}  a config, command line, file, work directory or data set that cannot be used
  {DOES_NOT_FIT}  preflight: it does not fit into the memory of the chips
  {DIVERGED}  the loss or the gradient is not finite
  {INTERRUPTED}  stopped by SIGTERM or Ctrl-C after saving; the same command continues
  {KILLED}  stopped by Ctrl-C before there was anything to save, or by a second one"""

_OVERRIDES = """Any key of the config can be set from the command line: --config.optim.lr=0.05 --config.lowrank.scale=0.1"""

_TRAIN = f"""examples:
  lowrank train --config=configs/digits_resnet.py --workdir=runs/digits
  lowrank train --config=configs/digits_resnet.py --config.lowrank.method=spectral --workdir=runs/spectral
  lowrank train --config=configs/digits_resnet.py --config.lowrank.method=none --workdir=runs/dense

The same command on the same --workdir resumes an interrupted run exactly. {_OVERRIDES}

{_STATUS}"""

_EVALUATE = f"""examples:
  lowrank evaluate --workdir=runs/digits
  lowrank evaluate --workdir=runs/digits --step=best --split=train --json=train.json
  lowrank evaluate --workdir runs/sweep/* --json=sweep.json
  lowrank evaluate --workdir=runs/imagenet --dataset=imagenet_v2
  lowrank evaluate --workdir=runs/digits --watch

Of several work directories one that cannot be evaluated is reported, and the rest go on; the status is {BAD_INPUT} then.

--watch runs beside training: it waits for the work directory, evaluates the checkpoints that it finds there, adds each to
DIR/watch_SPLIT.jsonl and to TensorBoard, and ends with the run. Stopped, it goes on where it was when started again.

{_STATUS}"""

_SWEEP = f"""examples:
  lowrank sweep --config=configs/digits_resnet.py --workdir=runs/sweep --jobs=2 \\
      --sweep='lowrank.scale=0.05,0.1; lowrank.method=none,spectral,kernel_projection; seed=0:3'
  lowrank sweep ... --dry-run
  lowrank sweep ... --engine=ray --gpus=0.5 --asha-grace='5 epochs'
  lowrank sweep ... --workdir=gs://bucket/sweep --emit=jobset --tpu=v5e:4x4 --image=IMAGE | kubectl apply -f -
  lowrank sweep ... --config.dataset.train_split='train[:90%]' --config.dataset.valid_split='train[90%:]' \\
      --sweep='lowrank.method=spectral,kernel_projection; seed=0:5; tune(optim.lr=0.03,0.1,0.3)'

the sweep: terms separated by semicolons, of which every combination is a trial
  key=a,b,c                  values of any key of the config; brackets and quotes protect commas
  seed=0:5                   whole numbers, 5 excluded; 0:10:2 every second one
  zip(key=a,b; other=c,d)    values that belong together: (a, c) and (b, d)
  tune(optim.lr=a,b,c)       every value at the first seed, the best by top-1 on dataset.valid_split at the others
A dense arm (lowrank.method=none) has no rank and appears once.

Every trial is `lowrank train` in a folder of its own under --workdir, its output in log.txt there.  The same command goes on
where it was stopped; finished trials are not repeated.  A trial that crashes is tried once more.  {_OVERRIDES}

{_STATUS}"""

_REPORT = """examples:
  lowrank report runs/sweep
  lowrank report runs/sweep --rival=optim.frobenius_decay=0
  lowrank report runs/a runs/b gs://bucket/sweep --out=runs/report"""

_OVERVIEW = f"""examples:
  lowrank overview --config=configs/digits_resnet.py
  lowrank overview --config=configs/fashion_mnist_resnet.py --config.lowrank.scale=0.1
  lowrank overview --config=configs/imagenet_resnet50_lowrank.py --config.mesh.fsdp=4 --devices=16

Touches no data, computes nothing and needs none of the devices. {_OVERRIDES}"""

_PREFLIGHT = f"""examples:
  lowrank preflight --config=configs/imagenet_resnet50_lowrank.py --topology=v5e:4x4
  lowrank preflight --config=configs/imagenet_vit_lowrank.py --topology=v4:2x2x2 --sweep='lowrank.scale=0.05,0.1,0.25'
  lowrank preflight --config=configs/imagenet_resnet50.py --topology=v6e:16x16 --config.batch_size=16384 --effort=full

Has the TPU's compiler say what the training step, the evaluation and the initialiser would take of a chip, beside what those
of the dense twin (lowrank.method=none) would.  No TPU is needed, pip install 'lowrank_jax[tpu-preflight]' is; nothing runs, and
all figures are the compiler's estimates.  Slices are named by their generation, v3, v4, v5e, v5p or v6e, and their topology.

--effort=fast has the FLOPs of full, the memory within some per cent, its bytes and times are those of a
program that is optimised less. full takes minutes for each program.

{_OVERRIDES}

{_STATUS}"""

_INIT_REPORT = f"""examples:
  lowrank init-report --config=configs/digits_resnet.py --out=runs/init_digits
  lowrank init-report --config=configs/digits_resnet.py --images=data --seeds=3 --config.lowrank.moment_batches=2
  lowrank init-report --config=configs/digits_resnet.py --scales=0.1 --methods=spectral,function_approximation

Trains nothing. Writes OUT.md, OUT.json and OUT.png. {_OVERRIDES}"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with its status."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser, overrides, rest = _parser(), *_split_overrides(given)
    args = parser.parse_args(rest)
    args.overrides, args.given = overrides, given[1:]
    _quieten()
    try:
        sys.exit(_run(args))
    except KeyboardInterrupt:
        sys.exit(_failed(KILLED, "lowrank: interrupted"))


def _run(args: argparse.Namespace) -> int:
    from lowrank_jax.checkpoint import CheckpointError
    from lowrank_jax.config import ConfigError
    from lowrank_jax.data.datasets import DataError
    from lowrank_jax.distributed import ClusterError, OtherFailed, end_with_the_others, several
    from lowrank_jax.preflight import PreflightError
    from lowrank_jax.train import Diverged
    from lowrank_jax.workdir import WorkdirError

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
    from lowrank_jax.distributed import end_all, several

    if several():
        end_all(status, message)
    print(message, file=sys.stderr)
    return status


def _train(args: argparse.Namespace) -> int:
    from lowrank_jax import config as configs
    from lowrank_jax.train import train

    _join(args)
    source, loaded = _load(args)
    config = configs.parse(loaded, source=source, devices=jax.device_count())
    return INTERRUPTED if train(config, args.workdir, source=source).interrupted else 0


def _evaluate(args: argparse.Namespace) -> int:
    from lowrank_jax.evaluate import Evaluator, evaluate_all

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
    from lowrank_jax.config import ConfigError
    from lowrank_jax.watch import watch

    if flags := _given(args, _HOSTS):
        raise ConfigError("--watch", [f"it is one process: leave out {' '.join(f'--{flag}' for flag in flags)}"])
    if args.json or args.step != "latest":
        raise ConfigError("--watch", ["it evaluates every checkpoint into a file of its own: leave out --step and --json"])
    outcome = watch(workdirs, evaluator, poll=args.poll, say=_say, complain=_complain)
    if outcome.interrupted:
        return INTERRUPTED
    return BAD_INPUT if outcome.failed else 0


def _join(args: argparse.Namespace) -> None:
    from lowrank_jax import distributed

    distributed.start(distributed.Cluster(**_given(args, _HOSTS)))


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
    from lowrank_jax.sweep import launch, trials

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


# The flags of `sweep` that only one of its ways to run trials takes, all None unless given.
_RAY = ("ray_address", "cpus", "gpus", "tpus", "asha_grace", "asha_reduction")
_JOBSET = ("tpu", "image", "name", "namespace", "queue", "service_account", "spot", "max_restarts", "grace")


def _check_sweep_flags(args: argparse.Namespace) -> None:
    from lowrank_jax.config import ConfigError

    ways = {"--engine=ray": (args.engine == "ray" and not args.emit, _RAY), "--emit=jobset": (args.emit == "jobset", _JOBSET)}
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
        from lowrank_jax.sweep import local

        return functools.partial(local.run, jobs=args.jobs or 1)
    from lowrank_jax.sweep import ray_tune

    asha = None
    if args.asha_grace is not None:
        grace = sweep.first[0].config.in_steps(args.asha_grace)
        asha = ray_tune.Asha(grace, **({"reduction": args.asha_reduction} if args.asha_reduction is not None else {}))
    resources = ray_tune.Resources(**_given(args, ("cpus", "gpus", "tpus")))
    return functools.partial(ray_tune.run, address=args.ray_address, jobs=args.jobs, resources=resources, asha=asha, say=_say)


def _emitted(args: argparse.Namespace, sweep: "Sweep") -> str:
    from lowrank_jax.config import ConfigError
    from lowrank_jax.sweep import emit, trials

    chosen = bool(sweep.later) and all(trials.known_outcome(trial) for trial in sweep.first)
    if sweep.later and not chosen:
        print("lowrank: the trials at the first seed; when they are done, the same command gives the others", file=sys.stderr)
    wanted = sweep.chosen() if chosen else sweep.first
    if "://" not in args.workdir:  # for the report; a bucket may be out of reach from here
        trials.record(args.workdir, sweep, wanted, f"lowrank sweep {shlex.join(args.given)}")
    try:
        return emit.shell(wanted) if args.emit == "sh" else emit.jobset(wanted, emit.Cluster(**_given(args, _JOBSET)))
    except ValueError as error:
        raise ConfigError(f"--emit={args.emit}", str(error).splitlines()) from None


def _report(args: argparse.Namespace) -> int:
    from lowrank_jax.report.page import Report

    report = Report(args.folders, rival=args.rival, tune=args.tune)
    paths = report.write(args.out or args.folders[0])
    print(report.console())
    print("\n".join(paths))
    return 0


def _overview(args: argparse.Namespace) -> int:
    from lowrank_jax import config as configs
    from lowrank_jax.overview import overview

    jax.config.update("jax_platforms", "cpu")  # not even to look at: another process may hold the accelerators
    source, loaded = _load(args)
    devices = args.devices or configs.parse(loaded, source=source).mesh.least_devices
    print(overview(configs.parse(loaded, source=source, devices=devices), devices, source))
    return 0


def _preflight(args: argparse.Namespace) -> int:
    from lowrank_jax import estimates, preflight_report

    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine may be in use, and is not what is asked about
    with _written_in_the_end(args.json) as output:

        def end(*_: object) -> None:
            # Here rather than by an exception, which is lost where Python is in a callback, and waits for the compiler.
            output.give_up()
            _complain("lowrank: interrupted")
            os._exit(KILLED)

        signal.signal(signal.SIGINT, end)
        report = preflight_report.run(
            _wanted(args),
            args.topology,
            source=args.config,
            effort=args.effort,
            cache=estimates.Cache(None if args.no_cache else cache_home() / "preflight"),
            say=_complain,
        )
        print(report)
        output.write(report.json())
    return 0 if report.fits else DOES_NOT_FIT


def _wanted(args: argparse.Namespace) -> "list[Wanted]":
    from lowrank_jax import config as configs
    from lowrank_jax.estimates import Wanted
    from lowrank_jax.sweep import trials

    if args.sweep:
        sweep = trials.expand(args.config, args.overrides, args.sweep, "preflight")
        return [Wanted(trial.name, trial.config) for trial in sweep.first]
    source, loaded = _load(args)
    config = configs.parse(loaded, source=source)
    low = config.lowrank
    size = f"scale={low.scale:g}" if low.scale is not None else f"rank={low.rank}"
    return [Wanted("dense" if low.method == "none" else size, config)]


def _init_report(args: argparse.Namespace) -> int:
    from lowrank_jax import config as configs
    from lowrank_jax import init_report
    from lowrank_jax.plans import align

    source, loaded = _load(args)
    config = configs.parse(loaded, source=source)
    given = {name: getattr(args, name) for name in ("scales", "methods", "seeds", "images", "batch_size")}
    settings = init_report.Settings(**{name: value for name, value in given.items() if value is not None})
    settings.check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # what compilation takes is part of the report
    first = pathlib.Path(f"{args.out}.md")
    first.parent.mkdir(parents=True, exist_ok=True)
    first.touch()  # rather now than after all of it
    arms = init_report.compare(config, settings, say=_say)
    print(align(init_report.summary(arms)))
    command = f"lowrank init-report {shlex.join(args.given)}"
    for path in init_report.write(arms, args.out, command=command, config=config, settings=settings):
        print(path)
    return 0


def _load(args: argparse.Namespace):
    from lowrank_jax import config as configs

    config = configs.load(args.config)
    for key, text in args.overrides:
        configs.override(config, key, text)
    return args.config, config


def _split_overrides(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of the arguments."""
    overrides, rest = [], []
    queue = list(argv)
    while queue:
        argument = queue.pop(0)
        match = re.fullmatch(r"--config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            rest.append(argument)
        elif match[2] is not None:
            overrides.append((match[1], match[2]))
        elif queue and not queue[0].startswith("--"):
            overrides.append((match[1], queue.pop(0)))
        else:
            print(f"lowrank: {argument} needs a value: {argument}=...", file=sys.stderr)
            sys.exit(BAD_INPUT)
    return overrides, rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowrank", description="Train and evaluate low-rank neural networks.", epilog=_STATUS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    def add(name: str, function, summary: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=function, overrides=[])
        return sub

    train = add("train", _train, "Train from a config file, or go on where a run stopped.", _TRAIN)
    train.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")
    train.add_argument("--workdir", required=True, type=_not_empty, help="folder of the run, local or remote (gs://...)")

    _add_hosts(train)

    evaluate = add("evaluate", _evaluate, "Evaluate a checkpoint on every example of a split.", _EVALUATE)
    evaluate.add_argument(
        "--workdir", required=True, type=_not_empty, nargs="+", action="extend", metavar="DIR", help="folders of runs"
    )
    evaluate.add_argument("--step", default="latest", help="latest (default), best by top-1, or a number")
    evaluate.add_argument("--split", help='such as "test" or "train[:1000]"; default: the config\'s dataset.eval_split')
    evaluate.add_argument("--dataset", metavar="NAME", help="another data set of the same classes, such as imagenet_v2")
    evaluate.add_argument("--data-dir", help="where the data is on this machine, if not where it was in training")
    evaluate.add_argument(
        "--max-undecodable", type=_whole, metavar="N", help="how many images may not decode, if not what it was in training"
    )
    evaluate.add_argument("--json", type=_not_empty, metavar="FILE", help="write the numbers here too")
    evaluate.add_argument("--watch", action="store_true", help="evaluate every checkpoint as it appears, until training ends")
    evaluate.add_argument("--poll", type=_seconds, default=10.0, metavar="SECONDS", help="between two looks; default: 10")
    _add_hosts(evaluate)

    sweep = add("sweep", _sweep, "Train many runs that differ in a few settings.", _SWEEP)
    sweep.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")
    sweep.add_argument("--sweep", required=True, metavar="TEXT", help="what to vary; see below")
    sweep.add_argument(
        "--workdir", required=True, type=_not_empty, help="folder of the sweep; each trial has one of its own in it"
    )
    sweep.add_argument("--dry-run", action="store_true", help="print the table of trials and start nothing")
    sweep.add_argument("--jobs", type=_count, metavar="N", help="trials at a time; default: 1, with ray what there is room for")
    sweep.add_argument("--engine", choices=("local", "ray"), help="child processes (default), or a Ray cluster")
    ray = sweep.add_argument_group("with --engine=ray")
    ray.add_argument(
        "--ray-address", metavar="ADDRESS", help="auto or host:6379; default: RAY_ADDRESS, else this machine alone"
    )
    ray.add_argument("--cpus", type=float, metavar="N", help="of every trial; default: 1")
    ray.add_argument("--gpus", type=float, metavar="N", help="of every trial; a fraction shares one; default: 0")
    ray.add_argument("--tpus", type=int, metavar="N", help="chips of every trial; default: 0")
    ray.add_argument(
        "--asha-grace", type=_duration, metavar="LENGTH", help='stop poor trials early, never before "500 steps", say'
    )
    ray.add_argument("--asha-reduction", type=float, metavar="N", help="one in N goes on at each rung; default: 4")
    sweep.add_argument("--emit", choices=("sh", "jobset"), help="print shell lines or Kubernetes JobSets instead of running")
    jobset = sweep.add_argument_group("with --emit=jobset")
    jobset.add_argument("--tpu", metavar="TYPE", help="slice of every trial, such as v5e:4x4")
    jobset.add_argument("--image", help="container image that holds lowrank and the config file")
    jobset.add_argument("--name", help="of the sweep in Kubernetes; default: lowrank")
    jobset.add_argument("--namespace", help="default: the one that kubectl is set to")
    jobset.add_argument("--queue", help="a LocalQueue of Kueue")
    jobset.add_argument("--service-account", metavar="NAME", help="that may read and write the work directories")
    jobset.add_argument("--spot", action="store_true", default=None, help="ask for spot nodes")
    jobset.add_argument("--max-restarts", type=int, metavar="N", help="of each trial; default: 20")
    jobset.add_argument("--grace", type=_count, metavar="SECONDS", help="from SIGTERM to SIGKILL; default: 300")

    report = add("report", _report, "Compare finished runs on one page.", _REPORT)
    report.add_argument("folders", nargs="+", metavar="DIR", type=_not_empty, help="of a sweep or a run, local or a URL")
    report.add_argument("--out", metavar="DIR", help="where to write; default: the first DIR")
    report.add_argument("--rival", metavar="METHOD|KEY=VALUE", help="what other arms are set against; default: spectral")
    report.add_argument(
        "--tune",
        type=_names,
        default=("optim.lr",),
        metavar="KEY,...",
        help="shown at its best by validation; default: optim.lr",
    )

    overview = add(
        "overview", _overview, "Show every kernel with its rank, or why it stays dense, and what each device holds.", _OVERVIEW
    )
    overview.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")
    overview.add_argument(
        "--devices", type=_count, metavar="N", help="show what each of N devices holds; default: the fewest that the mesh takes"
    )

    flight = add("preflight", _preflight, "Estimate what training takes of a TPU slice, without one.", _PREFLIGHT)
    flight.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")
    flight.add_argument("--topology", required=True, metavar="SLICE", help="such as v5e:4x4 or v4:2x2x2")
    flight.add_argument("--sweep", metavar="TEXT", help="arms that differ in a few settings; see lowrank sweep --help")
    flight.add_argument("--effort", choices=("fast", "full"), default="fast", help="of the compiler; default: fast")
    flight.add_argument("--json", type=_not_empty, metavar="FILE", help="write the numbers here too")
    flight.add_argument("--no-cache", action="store_true", help="compile again what has been compiled before")

    init = add("init-report", _init_report, "Compare initialisations of a network, without training it.", _INIT_REPORT)
    init.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")
    init.add_argument("--out", default="runs/init_report", type=_not_empty, help="path of the report, without suffix")
    init.add_argument("--scales", type=_numbers, metavar="A,B,...", help="ranks to try, as fractions; default: 0.05,0.1,0.25")
    init.add_argument("--methods", type=_names, metavar="A,B,...", help="methods to compare; default: the quick ones")
    init.add_argument("--seeds", type=_count, metavar="N", help="draw the network N times, from config.seed on; default: 1")
    init.add_argument("--images", metavar="KIND", help="what logits are computed from: noise (default) or data")
    init.add_argument("--batch-size", type=_count, metavar="N", help="of those images; default: 16")
    return parser


def _add_hosts(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "several hosts", "The same command on each; TPU slices, GKE, Slurm and Open MPI are detected and need no flags."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, as the others reach it")
    group.add_argument("--processes", type=_count, metavar="N", help="how many there are; 1: alone, whatever is detected")
    group.add_argument("--process", type=_whole, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--heartbeat", type=_count, metavar="SECONDS", help="until the others end when one was lost; default: 100"
    )
    group.add_argument("--patience", type=_count, metavar="SECONDS", help="to wait for the others at the start; default: 300")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.05,0.1") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return value


def _duration(text: str) -> Any:
    from lowrank_jax.schema import Duration

    try:
        return Duration.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be {error}") from None


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


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
