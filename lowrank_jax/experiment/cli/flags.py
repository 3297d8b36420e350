"""Flags of every command, and their help."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lowrank_jax.experiment import shipped
from lowrank_jax.experiment.cli import flag_types
from lowrank_jax.experiment.errors import BAD_INPUT, DONE, MEANINGS

# The flags that say which of several processes this is.
HOSTS = ("coordinator", "processes", "process", "heartbeat", "patience")

# The flags of `sweep` that only one way of running trials takes; each is None unless given.
RAY = ("ray_address", "cpus", "gpus", "tpus", "asha_grace", "asha_reduction")
JOBSET = ("tpu", "image", "name", "namespace", "queue", "service_account", "spot", "max_restarts", "grace")

_STATUS = "\n".join(["exit status:", *(f"  {status:<3}  {meaning}" for status, meaning in MEANINGS.items())])

_OVERRIDES = "Set any config key on the command line: --config.optim.lr=0.05 --config.lowrank.scale=0.1"


class _Show(argparse.Action):
    """Calls a function, and ends the command."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.const()
        sys.exit(DONE)


def parser(
    commands: Mapping[str, Callable[[argparse.Namespace], int]], show_version: Callable[[], None]
) -> argparse.ArgumentParser:
    """A parser whose result holds the chosen command's function as `command`, and its name as `called`."""
    parser = argparse.ArgumentParser(prog="lowrank", description="Train and evaluate low-rank neural networks.")
    parser.epilog = "\n".join([_STATUS, "", "documentation:", *(f"  {path}" for path in shipped.documents())])
    parser.add_argument(
        "--version",
        action=_Show,
        nargs=0,
        const=show_version,
        help="show the versions of lowrank, jax and flax, and the devices",
    )
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
        command.set_defaults(command=commands[name], called=name)
        add_flags(command)
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
  lowrank train --config=digits_resnet --workdir=runs/digits
  lowrank train --config=digits_resnet --config.lowrank.method=spectral --workdir=runs/spectral
  lowrank train --config=digits_resnet --config.lowrank.method=none --workdir=runs/dense
  lowrank train --config=digits_resnet --config.lowrank.budget.params=0.25 --workdir=runs/quarter
  lowrank train --config=digits_resnet --config.lowrank.budget.macs=0.5 --config.lowrank.dense_warmup='5 epochs' \\
      --workdir=runs/half

A budget chooses the ranks, and takes the place of lowrank.scale; what it chose is in DIR/ranks.json. After a dense warm-up it
goes by the trained weights.

The same command on the same --workdir resumes an interrupted run exactly.
A run of 30 epochs is trained for longer by the same command with --config.epochs=60 --extend.
{_OVERRIDES}

{_STATUS}"""


def _train(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument("--workdir", required=True, type=flag_types.text, help="folder of the run, local or remote (gs://...)")
    command.add_argument(
        "--restart",
        action="store_true",
        help="begin anew, ranks included, if the run's checkpoints are gone; with checkpoints, resume as ever",
    )
    command.add_argument(
        "--extend", action="store_true", help="go on from the end of a run: for a larger epochs or steps than it has"
    )
    command.add_argument(
        "--schedule", choices=("restart", "constant"),
        help="with --extend: the learning rate's schedule anew over what is added (default), or its last rate",
    )  # fmt: skip
    _add_hosts(command)


_COMPRESS = f"""examples:
  lowrank compress --config=digits_resnet --config.init.weights=runs/dense@best --config.lowrank.budget.macs=0.5 \\
      --workdir=runs/half
  lowrank compress --config=mine.py --config.init.weights=timm:resnet50=r50.pth --config.lowrank.budget.params=0.5 \\
      --workdir=runs/resnet50
  lowrank evaluate --workdir=runs/half --against=runs/dense@best
  lowrank report runs/dense runs/half

It runs the trained network on batches of training images, whose labels it does not read, chooses the ranks that lose least of
its predictions within the budget, factors it, and evaluates both networks on dataset.eval_split. What it leaves is step 0 of a
run: the last line says how to train it on.

Unless told otherwise it sets --config.lowrank.method=two_sided (whatever the config has, which is for training from scratch),
--config.lowrank.moment_batches=8 and, with a budget, --config.lowrank.budget.objective=divergence. Without a budget,
lowrank.scale and rules decide.
{_OVERRIDES}

{_STATUS}"""


def _compress(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument("--workdir", required=True, type=flag_types.text, help="folder of the run, local or remote (gs://...)")
    command.add_argument("--restart", action="store_true", help="begin anew if the run's checkpoints are gone")
    command.add_argument(
        "--json", type=flag_types.text, metavar="FILE", help="write the figures, and those of all layers, as JSON"
    )
    _add_hosts(command)


_EVALUATE = f"""examples:
  lowrank evaluate --workdir=runs/digits
  lowrank evaluate --workdir=runs/digits --step=best --split=train --json=train.json
  lowrank evaluate --workdir=runs/digits --classes --confusion=confusion.png
  lowrank evaluate --workdir runs/sweep/* --json=sweep.json
  lowrank evaluate --workdir=runs/imagenet --dataset=imagenet_v2
  lowrank evaluate --workdir=runs/digits --against=runs/dense@best
  lowrank evaluate --workdir=runs/digits --watch

--against runs another run's network on the same examples, whose labels it does not read. It adds for how many of them both
choose the same class (agreement), KL(the other || this one) in nats, and the relative errors of the logits and of the layers
that are factored in either: the worst five, and all in --json. Both networks must take the same images and give as many
outputs; each gets pixels normalised as in its own training.

With several work directories, those that cannot be evaluated are reported and the others are evaluated; the exit status is
then {BAD_INPUT}. The files of a sweep and of its report beside them are passed over.

--watch runs beside training. It waits for the work directory, evaluates each checkpoint as it appears, adds the results to
DIR/watch_SPLIT.jsonl and to TensorBoard, and ends when training ends. The same command resumes it.

A run's config may name code to import: "package.module:Model", a loss, a metric. Unless it is lowrank_jax's own, it is only
imported with --trust-code. Everything else in a work directory is data and runs nothing.

{_STATUS}"""


def _evaluate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--workdir", required=True, type=flag_types.text, nargs="+", action="extend", metavar="DIR",
        help="work directories of runs",
    )  # fmt: skip
    _add_step(command)
    add("--split", type=flag_types.text, help='e.g. "test" or "train[:1000]"; default: dataset.eval_split of the config')
    add("--dataset", type=flag_types.text, metavar="NAME", help="another data set with the same classes, e.g. imagenet_v2")
    add("--data-dir", type=flag_types.text, help="folder of the data on this machine; default: the one used in training")
    add(
        "--max-undecodable",
        type=flag_types.whole,
        metavar="N",
        help="maximum number of undecodable images; default: the config's",
    )
    _add_trust(command)
    add("--classes", action="store_true", help="also show the top-1 of each class, and what it is most often taken for")
    add("--confusion", type=flag_types.text, metavar="FILE.png", help="also draw the confusion matrix")
    add(
        "--against", type=flag_types.text, metavar="DIR[@STEP]",
        help="also compare each network with that of this run: @latest (default), @best or the number of a step",
    )  # fmt: skip
    add(
        "--json", type=flag_types.text, metavar="FILE",
        help="also write the results to this file, with the top-1 of each class, the confusion matrix, and every layer's error",
    )  # fmt: skip
    add("--watch", action="store_true", help="evaluate every checkpoint as it appears, until training ends")
    add("--poll", type=flag_types.seconds, default=10.0, metavar="SECONDS", help="polling interval of --watch; default: 10")
    _add_hosts(command)


_PREDICT = f"""examples:
  lowrank predict --workdir=runs/photos --step=best photo.jpg other.png
  lowrank predict --workdir=runs/photos --csv=predictions.csv folder/of/images
  lowrank predict --workdir=runs/photos --json=predictions.json images/*

Prints the five likeliest classes of each image with their probabilities, or writes them to a file. Images are decoded and
cropped as in evaluation. Where a run's own images have one size, others are cropped at the centre and resized, and turned grey
if its own are; that is said. In the place of a folder come the images in it and below, by their suffixes; hidden files and
others are passed over and counted.

Images that cannot be read are named and counted, and the others are predicted; the exit status is then {BAD_INPUT}.

{_STATUS}"""


def _predict(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--workdir", required=True, type=flag_types.text, metavar="DIR", help="work directory of the run")
    add("images", nargs="+", type=flag_types.text, metavar="IMAGES", help="image files, and folders that hold some")
    _add_step(command)
    add("--raw", action="store_true", help="use the weights themselves where the run keeps an average")
    add("--csv", type=flag_types.text, metavar="FILE", help="write the predictions to this file instead of printing them")
    add("--json", type=flag_types.text, metavar="FILE", help="the same as JSON")
    _add_trust(command)


_SWEEP = f"""examples:
  lowrank sweep --config=digits_resnet --workdir=runs/sweep --jobs=2 \\
      --sweep='lowrank.scale=0.05,0.1; lowrank.method=none,spectral,kernel_projection; seed=0:3'
  lowrank sweep ... --sweep='lowrank.budget.params=0.1,0.25; lowrank.method=none,spectral,kernel_projection; seed=0:3'
  lowrank sweep ... --dry-run
  lowrank sweep ... --engine=ray --gpus=0.5 --asha-grace='5 epochs'
  lowrank sweep ... --workdir=gs://bucket/sweep --emit=jobset --tpu=v5e:4x4 --image=IMAGE | kubectl apply -f -
  lowrank sweep ... --config.dataset.train_split='train[:90%]' --config.dataset.valid_split='train[90%:]' \\
      --sweep='lowrank.method=spectral,kernel_projection; seed=0:5; tune(optim.lr=0.03,0.1,0.3)'

the sweep: terms separated by semicolons; every combination of their values is a trial
  key=a,b,c                  values of any config key; brackets and quotes protect commas
  seed=0:5                   a range of whole numbers without its end; 0:10:2 takes every second one
  zip(key=a,b; other=c,d)    values that change together: (a, c) and (b, d)
  tune(optim.lr=a,b,c)       every value at the first seed, then the other seeds at the best by top-1 on dataset.valid_split
A dense arm (lowrank.method=none) has no rank and appears once. A budget takes the place of a scale, so a sweep has one of them,
or compares them by zip(lowrank.scale=0.1,None; lowrank.budget.params=None,0.1).

Every trial is a `lowrank train` with a folder of its own under --workdir, where log.txt holds its output. The same command
resumes a stopped sweep and does not repeat finished trials. A trial that crashes is retried once.
{_OVERRIDES}

{_STATUS}"""


def _sweep(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    add = command.add_argument
    add("--sweep", type=flag_types.text, required=True, metavar="TEXT", help="what to vary; see below")
    add("--workdir", required=True, type=flag_types.text, help="folder of the sweep, which holds a folder for each trial")
    add("--dry-run", action="store_true", help="print the table of trials and start nothing")
    add(
        "--jobs",
        type=flag_types.count,
        metavar="N",
        help="trials to run at the same time; default: 1, with ray all that fit",
    )
    add("--engine", choices=("local", "ray"), help="run trials in child processes (local, default) or on a Ray cluster")
    add("--emit", choices=("sh", "jobset"), help="print shell commands or Kubernetes JobSets instead of running")
    _add_ray(command)
    _add_jobset(command)


def _add_ray(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("with --engine=ray").add_argument
    add(
        "--ray-address",
        type=flag_types.text,
        metavar="ADDRESS",
        help="auto or HOST:PORT; default: RAY_ADDRESS, else a cluster on this machine",
    )
    add("--cpus", type=float, metavar="N", help="CPU cores per trial; default: 1")
    add("--gpus", type=float, metavar="N", help="GPUs per trial; a fraction shares one; default: 0")
    add("--tpus", type=int, metavar="N", help="TPU chips per trial; default: 0")
    add(
        "--asha-grace", type=flag_types.duration, metavar="LENGTH",
        help='stop poor trials early, but never before this point, e.g. "500 steps"; it must come after every dense warm-up and'
        " self-guided phase",
    )  # fmt: skip
    add("--asha-reduction", type=float, metavar="N", help="keep the best 1/N at each rung; default: 4")


def _add_jobset(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("with --emit=jobset").add_argument
    add("--tpu", type=flag_types.text, metavar="TYPE", help="TPU slice per trial, e.g. v5e:4x4")
    add("--image", type=flag_types.text, help="container image with lowrank and the config file")
    add("--name", type=flag_types.text, help="name of the sweep in Kubernetes; default: lowrank")
    add("--namespace", type=flag_types.text, help="Kubernetes namespace; default: the one kubectl is set to")
    add("--queue", type=flag_types.text, help="LocalQueue of Kueue")
    add(
        "--service-account",
        type=flag_types.text,
        metavar="NAME",
        help="service account that may read and write the work directories",
    )
    add("--spot", action="store_true", default=None, help="use spot nodes")
    add("--max-restarts", type=int, metavar="N", help="maximum number of restarts per trial; default: 20")
    add("--grace", type=flag_types.count, metavar="SECONDS", help="seconds between SIGTERM and SIGKILL; default: 300")


_REPORT = """examples:
  lowrank report runs/sweep
  lowrank report runs/sweep --rival=lowrank.scale=0.1
  lowrank report runs/budgets --rival=lowrank.budget.objective=correlation
  lowrank report runs/a runs/b gs://bucket/sweep --out=runs/report"""


def _report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("folders", nargs="+", metavar="DIR", type=flag_types.text, help="folder of a sweep or a run, local or a URL")
    add("--out", metavar="DIR", type=flag_types.text, help="folder to write to; default: the first DIR")
    add(
        "--rival",
        type=flag_types.text,
        metavar="METHOD|KEY=VALUE",
        help="arm that the others are compared with: a method, or a value of a setting that runs differ in; default: spectral",
    )
    add(
        "--tune", type=flag_types.names, default=("optim.lr",), metavar="KEY,...",
        help="settings to show at their best value on the validation split; default: optim.lr",
    )  # fmt: skip


_OVERVIEW = f"""examples:
  lowrank overview --config=digits_resnet
  lowrank overview --config=fashion_mnist_resnet --config.lowrank.scale=0.1
  lowrank overview --config=imagenet_resnet50_lowrank --config.mesh.fsdp=4 --devices=16
  lowrank overview --config=digits_resnet --config.lowrank.budget.params=0.25 --picture=budget.png

Reads no data and needs none of the devices. Only for a budget, or a picture, is anything computed: what each rank of a random
kernel of every shape loses.
{_OVERRIDES}"""


def _overview(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument(
        "--devices", type=flag_types.count, metavar="N", help="number of devices in the mesh; default: the fewest that fit"
    )
    command.add_argument(
        "--picture", type=flag_types.picture, metavar="FILE.png",
        help="also draw what the network loses by its budget, with the ranks chosen for it and with one scale; or FILE.svg",
    )  # fmt: skip


_PREFLIGHT = f"""examples:
  lowrank preflight --config=imagenet_resnet50_lowrank --topology=v5e:4x4
  lowrank preflight --config=imagenet_vit_lowrank --topology=v4:2x2x2 --sweep='lowrank.scale=0.05,0.1,0.25'
  lowrank preflight --config=imagenet_resnet50 --topology=v6e:16x16 --config.batch_size=16384 --effort=full
  lowrank preflight --config=imagenet_resnet50_lowrank --topology=v5e:4x4 --sweep='lowrank.budget.macs=0.25,0.5'
  lowrank preflight --config=imagenet_resnet50_lowrank --topology=v5e:4x4 \\
      --config.lowrank.budget.seconds=0.95 --config.lowrank.budget.chip=v5e

A budget of seconds also gets the line that lowrank.budget.rest needs: what the dense step takes besides its kernels. With a
dense warm-up, the dense network has to fit too.

Compiles the training step, the evaluation and the initialisation for a TPU, and compares the memory and time per chip with
those of the dense network (lowrank.method=none). Needs no TPU, only pip install 'lowrank_jax[train,tpu-preflight]'. Nothing
runs: all figures are the compiler's estimates. A slice is a generation (v3, v4, v5e, v5p or v6e) and a topology.

--effort=fast finds the FLOPs of full, and its memory within a few per cent; bytes and times are those of a less optimised
program. full takes minutes per program.

{_OVERRIDES}

{_STATUS}"""


def _preflight(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    add = command.add_argument
    add("--topology", type=flag_types.text, required=True, metavar="SLICE", help="TPU slice, e.g. v5e:4x4 or v4:2x2x2")
    add(
        "--sweep",
        type=flag_types.text,
        metavar="TEXT",
        help="compare arms that differ in a few settings; see lowrank sweep --help",
    )
    add("--effort", choices=("fast", "full"), default="fast", help="effort of the compiler; default: fast")
    add("--json", type=flag_types.text, metavar="FILE", help="also write the results to this file")
    add("--no-cache", action="store_true", help="recompile programs whose estimates are in the cache")


_INIT_REPORT = f"""examples:
  lowrank init-report --config=digits_resnet --out=runs/init_digits
  lowrank init-report --config=digits_resnet --images=data --seeds=3 --config.lowrank.moment_batches=2
  lowrank init-report --config=digits_resnet --scales=0.1 --methods=spectral,function_approximation
  lowrank init-report --config=digits_resnet --config.lowrank.budget.macs=0.5 --config.lowrank.budget.objective=risk

Trains nothing. Writes OUT.md, OUT.json, OUT.png, and OUT.budgets.png: what is lost by the budget's kind and objective, by
default by parameters and MACs. Methods are compared at scales; the budget's ranks are in lowrank overview.

Compiles a program for every scale and method, which serves all seeds and takes most of the time: of digits_resnet, a small
network, two to ten seconds each on two cores, so one to three minutes for the default 18; of deeper networks more. Choose fewer
by --scales and --methods.
{_OVERRIDES}"""


def _init_report(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    add = command.add_argument
    add(
        "--out", default="runs/init_report", type=flag_types.text,
        help="path of the report without its suffix; default: runs/init_report",
    )  # fmt: skip
    add(
        "--scales", type=flag_types.numbers, metavar="A,B,...",
        help="ranks to compare, as fractions of full rank; default: 0.05,0.1,0.25",
    )  # fmt: skip
    add("--methods", type=flag_types.names, metavar="A,B,...", help="methods to compare; default: the fast ones")
    add("--seeds", type=flag_types.count, metavar="N", help="number of networks to draw, from config.seed on; default: 1")
    add("--images", type=flag_types.text, metavar="KIND", help="images to compute logits of: noise (default) or data")
    add("--batch-size", type=flag_types.count, metavar="N", help="number of those images; default: 16")


_CONFIGS = """examples:
  lowrank configs
  lowrank configs copy digits_resnet .
  lowrank train --config=digits_resnet --workdir=runs/digits

Without copy, a line for each. A copy is a file to change: lowrank train --config=digits_resnet.py"""


def _configs(command: argparse.ArgumentParser) -> None:
    command.set_defaults(copy=None)
    copy = command.add_subparsers(metavar="[copy]").add_parser(
        "copy", help="write one into a folder, to be changed", description="Write one into a folder, to be changed."
    )
    copy.add_argument("copy", metavar="NAME", type=flag_types.text, help="as lowrank configs lists it")
    copy.add_argument("folder", metavar="DIR", nargs="?", default=".", type=flag_types.text, help="default: this folder")


_NEW = """examples:
  lowrank new mynet
  lowrank train --config=mynet/config.py --workdir=mynet/runs/a

Writes config.py, model.py, data.py and README.md into a new folder. They train as they are, in seconds; change
them to your own."""


def _new(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", type=flag_types.text, help="folder to make")


_COMMANDS = {
    "train": ("Train from a config file, or resume a run.", _TRAIN, _train),
    "compress": ("Make a trained network low-rank, and say what is lost.", _COMPRESS, _compress),
    "evaluate": ("Evaluate a checkpoint on every example of a split.", _EVALUATE, _evaluate),
    "predict": ("Print the likeliest classes of image files.", _PREDICT, _predict),
    "sweep": ("Train many runs that differ in a few settings.", _SWEEP, _sweep),
    "report": ("Compare finished runs on one page.", _REPORT, _report),
    "overview": ("Show the rank of every kernel, or why it stays dense, and what each device holds.", _OVERVIEW, _overview),
    "preflight": ("Estimate the memory and time that training takes on a TPU slice, without a TPU.", _PREFLIGHT, _preflight),
    "configs": ("List the configs that come with lowrank, or copy one.", _CONFIGS, _configs),
    "new": ("Start a project: a config, a model, data and a README that train as they are.", _NEW, _new),
    "init-report": ("Compare initialisations of a network without training it.", _INIT_REPORT, _init_report),
}


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        required=True,
        type=flag_types.text,
        metavar="CONFIG[:ARG]",
        help="name of a config that lowrank configs lists, or Python file that defines get_config(); ARG is its argument",
    )


def _add_step(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--step",
        default="latest",
        type=flag_types.text,
        help="latest (default), best (by eval.best), or a step number",
    )


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-code", nargs="?", action="append", type=flag_types.code, const=True, metavar="NAME",
        help="import this model, loss or metric that a run's config names; without a NAME, import whatever it names",
    )  # fmt: skip


def _add_hosts(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group(
        "several hosts",
        "Run the same command on every host. TPU slices, GKE, Slurm and Open MPI are detected and need no flags.",
    ).add_argument
    add(
        "--coordinator", type=flag_types.text, metavar="HOST:PORT", help="address of process 0, as the other processes reach it"
    )
    add("--processes", type=flag_types.count, metavar="N", help="number of processes; 1: run alone, whatever is detected")
    add("--process", type=flag_types.whole, metavar="I", help="index of this process, from 0")
    add(
        "--heartbeat", type=flag_types.count, metavar="SECONDS",
        help="seconds without a heartbeat before a process counts as lost; default: 100",
    )  # fmt: skip
    add(
        "--patience", type=flag_types.count, metavar="SECONDS",
        help="seconds to wait for the other processes at start-up; default: 300",
    )  # fmt: skip
