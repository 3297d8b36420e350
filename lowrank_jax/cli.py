"""The command line: `lowrank train | evaluate | overview | init-report`."""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import jax
from absl import logging

if TYPE_CHECKING:
    from lowrank_jax.evaluate import Evaluator

BAD_INPUT, DIVERGED, INTERRUPTED, KILLED = 2, 4, 75, 130

_STATUS = f"""exit status:
  0  done
  {BAD_INPUT}  a config, command line, file, work directory or data set that cannot be used
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
  lowrank evaluate --workdir=runs/digits --watch

Of several work directories one that cannot be evaluated is reported, and the rest go on; the status is {BAD_INPUT} then.

--watch runs beside training: it waits for the work directory, evaluates the checkpoints that it finds there, adds each to
DIR/watch_SPLIT.jsonl and to TensorBoard, and ends with the run. Stopped, it goes on where it was when started again.

{_STATUS}"""

_OVERVIEW = f"""examples:
  lowrank overview --config=configs/digits_resnet.py
  lowrank overview --config=configs/fashion_mnist_resnet.py --config.lowrank.scale=0.1

Touches no data and computes nothing. {_OVERRIDES}"""

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
        print("lowrank: interrupted", file=sys.stderr)
        sys.exit(KILLED)


def _run(args: argparse.Namespace) -> int:
    from lowrank_jax.checkpoint import CheckpointError
    from lowrank_jax.config import ConfigError
    from lowrank_jax.data.datasets import DataError
    from lowrank_jax.train import Diverged
    from lowrank_jax.workdir import WorkdirError

    try:
        return args.command(args)
    except (ConfigError, WorkdirError, DataError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except OSError as error:  # no such folder, no permission, no space left
        print(f"lowrank: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except Diverged as error:
        print(error, file=sys.stderr)
        return DIVERGED


def _train(args: argparse.Namespace) -> int:
    from lowrank_jax import config as configs
    from lowrank_jax.train import train

    source, loaded = _load(args)
    config = configs.parse(loaded, source=source, devices=jax.device_count())
    return INTERRUPTED if train(config, args.workdir, source=source).interrupted else 0


def _evaluate(args: argparse.Namespace) -> int:
    from lowrank_jax.evaluate import Evaluator, evaluate_all

    evaluator = Evaluator(split=args.split, data_dir=args.data_dir)
    workdirs = list(dict.fromkeys(args.workdir))
    if args.watch:
        return _watch(args, workdirs, evaluator)
    if args.json:
        pathlib.Path(args.json).touch()  # rather now than after the evaluation
    if len(workdirs) == 1:
        result = evaluator.evaluate(workdirs[0], args.step)
        print(result.table())
        done, text = [result], result.json()
    else:
        done = evaluate_all(workdirs, evaluator, args.step, say=_say, complain=_complain)
        objects = [{"workdir": workdir, **dataclasses.asdict(result)} for workdir, result in done.items()]
        text = json.dumps(objects, indent=2) + "\n"
    if args.json:
        pathlib.Path(args.json).write_text(text)
    return 0 if len(done) == len(workdirs) else BAD_INPUT


def _watch(args: argparse.Namespace, workdirs: list[str], evaluator: "Evaluator") -> int:
    from lowrank_jax.config import ConfigError
    from lowrank_jax.watch import watch

    if args.json or args.step != "latest":
        raise ConfigError("--watch", ["it evaluates every checkpoint into a file of its own: leave out --step and --json"])
    outcome = watch(workdirs, evaluator, poll=args.poll, say=_say, complain=_complain)
    if outcome.interrupted:
        return INTERRUPTED
    return BAD_INPUT if outcome.failed else 0


def _say(text: str) -> None:
    print(text, flush=True)


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _overview(args: argparse.Namespace) -> int:
    from lowrank_jax import config as configs

    source, loaded = _load(args)
    print(configs.make_plan(configs.parse(loaded, source=source)))
    return 0


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
    arms = init_report.compare(config, settings, say=functools.partial(print, flush=True))
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

    evaluate = add("evaluate", _evaluate, "Evaluate a checkpoint on every example of a split.", _EVALUATE)
    evaluate.add_argument(
        "--workdir", required=True, type=_not_empty, nargs="+", action="extend", metavar="DIR", help="folders of runs"
    )
    evaluate.add_argument("--step", default="latest", help="latest (default), best by top-1, or a number")
    evaluate.add_argument("--split", help='such as "test" or "train[:1000]"; default: the config\'s dataset.eval_split')
    evaluate.add_argument("--data-dir", help="where the data is on this machine, if not where it was in training")
    evaluate.add_argument("--json", metavar="FILE", help="write the numbers here too")
    evaluate.add_argument("--watch", action="store_true", help="evaluate every checkpoint as it appears, until training ends")
    evaluate.add_argument("--poll", type=_seconds, default=10.0, metavar="SECONDS", help="between two looks; default: 10")

    overview = add("overview", _overview, "Show every kernel with its rank, or why it stays dense.", _OVERVIEW)
    overview.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")

    report = add("init-report", _init_report, "Compare initialisations of a network, without training it.", _INIT_REPORT)
    report.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")
    report.add_argument("--out", default="runs/init_report", type=_not_empty, help="path of the report, without suffix")
    report.add_argument("--scales", type=_numbers, metavar="A,B,...", help="ranks to try, as fractions; default: 0.05,0.1,0.25")
    report.add_argument("--methods", type=_names, metavar="A,B,...", help="methods to compare; default: the quick ones")
    report.add_argument("--seeds", type=_count, metavar="N", help="draw the network N times, from config.seed on; default: 1")
    report.add_argument("--images", metavar="KIND", help="what logits are computed from: noise (default) or data")
    report.add_argument("--batch-size", type=_count, metavar="N", help="of those images; default: 16")
    return parser


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


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return value


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _quieten() -> None:
    """Libraries' start-up chatter off; a compilation cache on, unless the user has chosen one."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.set_verbosity(logging.ERROR)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # jax has read its environment by now, so it has to be told
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "lowrank_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
