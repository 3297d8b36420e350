"""What the command line takes: flags, their help, and what the exit statuses mean."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_jax.experiment.errors import BAD_INPUT, MEANINGS

# The flags that say which of several processes this is.
HOSTS = ("coordinator", "processes", "process", "heartbeat", "patience")

_STATUS = "\n".join(["exit status:", *(f"  {status:<3}  {meaning}" for status, meaning in MEANINGS.items())])

_OVERRIDES = """Any key of the config can be set from the command line: --config.optim.lr=0.05 --config.lowrank.scale=0.1"""


def parser(commands: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """A parser whose result has the chosen one as `command`."""
    parser = argparse.ArgumentParser(prog="lowrank", description="Train and evaluate low-rank neural networks.", epilog=_STATUS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    chosen = parser.add_subparsers(title="commands", required=True, metavar="command")
    for name, (summary, epilog, add_flags) in _COMMANDS.items():
        command = chosen.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_flags(command)
        command.set_defaults(command=commands[name])
    return parser


def split_overrides(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
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


_TRAIN = f"""examples:
  lowrank train --config=configs/digits_resnet.py --workdir=runs/digits
  lowrank train --config=configs/digits_resnet.py --config.lowrank.method=spectral --workdir=runs/spectral
  lowrank train --config=configs/digits_resnet.py --config.lowrank.method=none --workdir=runs/dense

The same command on the same --workdir resumes an interrupted run exactly. {_OVERRIDES}

{_STATUS}"""


def _train(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument("--workdir", required=True, type=_not_empty, help="folder of the run, local or remote (gs://...)")
    _add_hosts(command)


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


def _evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir", required=True, type=_not_empty, nargs="+", action="extend", metavar="DIR", help="folders of runs"
    )
    command.add_argument("--step", default="latest", help="latest (default), best by top-1, or a number")
    command.add_argument("--split", help='such as "test" or "train[:1000]"; default: the config\'s dataset.eval_split')
    command.add_argument("--dataset", metavar="NAME", help="another data set of the same classes, such as imagenet_v2")
    command.add_argument("--data-dir", help="where the data is on this machine, if not where it was in training")
    command.add_argument(
        "--max-undecodable", type=_whole, metavar="N", help="how many images may not decode, if not what it was in training"
    )
    command.add_argument("--json", type=_not_empty, metavar="FILE", help="write the numbers here too")
    command.add_argument("--watch", action="store_true", help="evaluate every checkpoint as it appears, until training ends")
    command.add_argument("--poll", type=_seconds, default=10.0, metavar="SECONDS", help="between two looks; default: 10")
    _add_hosts(command)


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

# The flags of `sweep` that only one of its ways to run trials takes, all None unless given.
RAY = ("ray_address", "cpus", "gpus", "tpus", "asha_grace", "asha_reduction")


JOBSET = ("tpu", "image", "name", "namespace", "queue", "service_account", "spot", "max_restarts", "grace")


def _sweep(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument("--sweep", required=True, metavar="TEXT", help="what to vary; see below")
    command.add_argument(
        "--workdir", required=True, type=_not_empty, help="folder of the sweep; each trial has one of its own in it"
    )
    command.add_argument("--dry-run", action="store_true", help="print the table of trials and start nothing")
    command.add_argument(
        "--jobs", type=_count, metavar="N", help="trials at a time; default: 1, with ray what there is room for"
    )
    command.add_argument("--engine", choices=("local", "ray"), help="child processes (default), or a Ray cluster")
    ray = command.add_argument_group("with --engine=ray")
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
    command.add_argument("--emit", choices=("sh", "jobset"), help="print shell lines or Kubernetes JobSets instead of running")
    jobset = command.add_argument_group("with --emit=jobset")
    jobset.add_argument("--tpu", metavar="TYPE", help="slice of every trial, such as v5e:4x4")
    jobset.add_argument("--image", help="container image that holds lowrank and the config file")
    jobset.add_argument("--name", help="of the sweep in Kubernetes; default: lowrank")
    jobset.add_argument("--namespace", help="default: the one that kubectl is set to")
    jobset.add_argument("--queue", help="a LocalQueue of Kueue")
    jobset.add_argument("--service-account", metavar="NAME", help="that may read and write the work directories")
    jobset.add_argument("--spot", action="store_true", default=None, help="ask for spot nodes")
    jobset.add_argument("--max-restarts", type=int, metavar="N", help="of each trial; default: 20")
    jobset.add_argument("--grace", type=_count, metavar="SECONDS", help="from SIGTERM to SIGKILL; default: 300")


_REPORT = """examples:
  lowrank report runs/sweep
  lowrank report runs/sweep --rival=optim.frobenius_decay=0
  lowrank report runs/a runs/b gs://bucket/sweep --out=runs/report"""


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", nargs="+", metavar="DIR", type=_not_empty, help="of a sweep or a run, local or a URL")
    command.add_argument("--out", metavar="DIR", help="where to write; default: the first DIR")
    command.add_argument("--rival", metavar="METHOD|KEY=VALUE", help="what other arms are set against; default: spectral")
    command.add_argument(
        "--tune",
        type=_names,
        default=("optim.lr",),
        metavar="KEY,...",
        help="shown at its best by validation; default: optim.lr",
    )


_OVERVIEW = f"""examples:
  lowrank overview --config=configs/digits_resnet.py
  lowrank overview --config=configs/fashion_mnist_resnet.py --config.lowrank.scale=0.1
  lowrank overview --config=configs/imagenet_resnet50_lowrank.py --config.mesh.fsdp=4 --devices=16

Touches no data, computes nothing and needs none of the devices. {_OVERRIDES}"""


def _overview(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument(
        "--devices", type=_count, metavar="N", help="show what each of N devices holds; default: the fewest that the mesh takes"
    )


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


def _preflight(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument("--topology", required=True, metavar="SLICE", help="such as v5e:4x4 or v4:2x2x2")
    command.add_argument("--sweep", metavar="TEXT", help="arms that differ in a few settings; see lowrank sweep --help")
    command.add_argument("--effort", choices=("fast", "full"), default="fast", help="of the compiler; default: fast")
    command.add_argument("--json", type=_not_empty, metavar="FILE", help="write the numbers here too")
    command.add_argument("--no-cache", action="store_true", help="compile again what has been compiled before")


_INIT_REPORT = f"""examples:
  lowrank init-report --config=configs/digits_resnet.py --out=runs/init_digits
  lowrank init-report --config=configs/digits_resnet.py --images=data --seeds=3 --config.lowrank.moment_batches=2
  lowrank init-report --config=configs/digits_resnet.py --scales=0.1 --methods=spectral,function_approximation

Trains nothing. Writes OUT.md, OUT.json and OUT.png. {_OVERRIDES}"""


def _init_report(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument("--out", default="runs/init_report", type=_not_empty, help="path of the report, without suffix")
    command.add_argument(
        "--scales", type=_numbers, metavar="A,B,...", help="ranks to try, as fractions; default: 0.05,0.1,0.25"
    )
    command.add_argument("--methods", type=_names, metavar="A,B,...", help="methods to compare; default: the quick ones")
    command.add_argument("--seeds", type=_count, metavar="N", help="draw the network N times, from config.seed on; default: 1")
    command.add_argument("--images", metavar="KIND", help="what logits are computed from: noise (default) or data")
    command.add_argument("--batch-size", type=_count, metavar="N", help="of those images; default: 16")


_COMMANDS = {
    "train": ("Train from a config file, or go on where a run stopped.", _TRAIN, _train),
    "evaluate": ("Evaluate a checkpoint on every example of a split.", _EVALUATE, _evaluate),
    "sweep": ("Train many runs that differ in a few settings.", _SWEEP, _sweep),
    "report": ("Compare finished runs on one page.", _REPORT, _report),
    "overview": ("Show every kernel with its rank, or why it stays dense, and what each device holds.", _OVERVIEW, _overview),
    "preflight": ("Estimate what training takes of a TPU slice, without one.", _PREFLIGHT, _preflight),
    "init-report": ("Compare initialisations of a network, without training it.", _INIT_REPORT, _init_report),
}


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")


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
    from lowrank_jax.experiment.duration import Duration

    try:
        return Duration.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be {error}") from None


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text
