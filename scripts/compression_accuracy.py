"""Writes docs/results/compression_resnet8.md: what a trained ResNet-8 keeps of its accuracy when it is compressed.

    scripts/prepare_fashion_mnist.sh          # once
    python -m scripts.compression_accuracy    # an hour or two on two cores; continues where it was stopped

A tenth of Fashion-MNIST's training images, three seeds, budgets of MACs.  Compressed networks are measured at once and after as
many further epochs as the dense one had; beside them, low-rank networks that had as many epochs in all, from scratch and with a
dense warm-up.
"""

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from lowrank_jax.experiment.report.arms import Interval
from lowrank_jax.text import markdown_table
from scripts.results import RESULTS, Results

EPOCHS, SEEDS = 6, (0, 1, 2)
BUDGETS = {"batch": (0.5, 0.25, 0.1), "none": (0.25,)}
NORMS = {"batch": "With BatchNorm", "none": "Without normalisation"}
RATES = {"batch": (0.3, 0.1), "none": (0.1, 0.03)}  # for weights that are drawn, and for trained ones
DENSE, FINE_TUNED, SCRATCH, WARM_UP = "dense", "two-sided, fine-tuned", "from scratch", "dense warm-up"
AT_ONCE = {"two-sided": "two_sided", "spectral": "spectral"}  # methods by the arm's name
ARMS = (*AT_ONCE, FINE_TUNED, SCRATCH, WARM_UP)
COMMON = {
    "dataset.train_split": "train[:10%]",
    "model.name": "resnet8",
    "optim.warmup": "1 epoch",
    "optim.clip_norm": "1.0",
    "log.tensorboard": "False",
    "log.every": "40 steps",
}

_results = Results("compression_resnet8.json")


class Case(NamedTuple):
    """One network of the table."""

    norm: str
    seed: int
    arm: str = DENSE
    budget: float | None = None

    def __str__(self) -> str:
        return "/".join(str(part) for part in self if part is not None)


def compute(norm: str, seed: int, folder: pathlib.Path) -> None:
    """A dense network, and all that are compared with it; what is known already is not done again."""
    for case in (Case(norm, seed), *(Case(norm, seed, arm, budget) for budget in BUDGETS[norm] for arm in ARMS)):
        if str(case) in _results.known():
            continue
        found = _compressed(case, folder) if case.arm in AT_ONCE else _trained(case, folder)
        _results.note(str(case), found)
        print(case, found, flush=True)


def _compressed(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    workdir = _workdir(case, folder)
    _lowrank("compress", workdir, _of_weights(case, folder))
    record = json.loads((workdir / "compression.json").read_text())
    sizes = {size: record[size] / record[f"dense_{size}"] for size in ("params", "macs")}
    fidelity = {name: record["fidelity"][name] for name in ("agreement", "kl")}
    return {"top1": record["low"]["top1"], "expected_kl": record["expected_kl"], **sizes, **fidelity}


def _trained(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    workdir = _workdir(case, folder)
    _lowrank("train", workdir, _of_weights(case, folder) if case.arm == FINE_TUNED else _of_nothing(case))
    result = json.loads((workdir / "result.json").read_text())
    return {"top1": result["eval"]["top1"], "params": result["params"] / result["dense_params"]}


def _of_nothing(case: Case) -> dict[str, Any]:
    """Settings of a network that is trained from its first step."""
    if case.budget is None:
        return {**_common(case, RATES[case.norm][0]), "epochs": EPOCHS, "lowrank.method": "none"}
    warm_up = {"lowrank.dense_warmup": f"{EPOCHS} epochs"} if case.arm == WARM_UP else {}
    return {**_common(case, RATES[case.norm][0]), "epochs": 2 * EPOCHS, "lowrank.budget.macs": case.budget, **warm_up}


def _of_weights(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """Settings of one that begins with the dense network's weights."""
    method = AT_ONCE.get(case.arm, "two_sided")
    return {
        **_common(case, RATES[case.norm][1]),
        "epochs": EPOCHS,
        "init.weights": folder / str(Case(case.norm, case.seed)),
        "lowrank.budget.macs": case.budget,
        "lowrank.method": method,
        "lowrank.moment_batches": 16,
        "lowrank.budget.objective": "divergence" if method == "two_sided" else "uniform",
    }


def _common(case: Case, rate: float) -> dict[str, Any]:
    return {**COMMON, "model.kwargs.norm": case.norm, "optim.lr": rate, "seed": case.seed}


def _workdir(case: Case, folder: pathlib.Path) -> pathlib.Path:
    """Fine-tuning goes on in the folder of what was compressed."""
    return folder / str(case._replace(arm="two-sided") if case.arm == FINE_TUNED else case)


def _lowrank(command: str, workdir: pathlib.Path, settings: dict[str, Any]) -> None:
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = ["--config=configs/fashion_mnist_resnet.py", f"--workdir={workdir}"]
    run = subprocess.run(
        [sys.executable, "-m", "lowrank_jax", command, *config, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if run.returncode:
        raise SystemExit(run.stdout.decode())


def page(known: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = [_part(norm, known) for norm in NORMS]
    return f"""# ResNet-8 on Fashion-MNIST, compressed

A tenth of the training images (6,000), up to {len(SEEDS)} seeds; top-1 on the 10,000 test images, ± half of the 95 %
interval of the mean by Student's t. Budgets are of MACs. The dense network trains {EPOCHS} epochs. *Two-sided* and
*spectral* are its weights, factored, and nothing else; the first with ranks of least divergence, the second with one
scale for all kernels. *Fine-tuned* trains the two-sided one for {EPOCHS} more epochs. *From scratch* and *dense
warm-up* ({EPOCHS} dense epochs, then {EPOCHS} of low rank) have {2 * EPOCHS} epochs in all and ranks by `tolerance`.
Learning rates: {RATES["batch"][0]} and {RATES["none"][0]} without normalisation, from trained weights
{RATES["batch"][1]} and {RATES["none"][1]}; nothing tuned. The command, which starts the runs:

    python -m scripts.compression_accuracy

{"".join(parts)}"""


def _part(norm: str, known: dict[str, Any]) -> str:
    def values(arm: str, budget: float | None, name: str) -> dict[int, float]:
        """By seed, of the runs that are known."""
        found = {seed: known.get(str(Case(norm, seed, arm, budget)), {}).get(name) for seed in SEEDS}
        return {seed: value for seed, value in found.items() if value is not None}

    def cells(arm: str, budget: float | None) -> list[str]:
        top1, scratch = values(arm, budget, "top1"), values(SCRATCH, budget, "top1")
        paired = [top1[seed] - scratch[seed] for seed in top1 if seed in scratch] if arm in (FINE_TUNED, WARM_UP) else []
        fidelity = [_mean(values(arm, budget, name).values()) for name in ("agreement", "kl", "expected_kl")]
        return [f"{budget or 1}", arm, f"{len(top1)}", _mean(top1.values()), _mean(paired, sign="+"), *fidelity]

    arms: list[tuple[str, float | None]] = [(DENSE, None), *((arm, budget) for budget in BUDGETS[norm] for arm in ARMS)]
    rows = [cells(arm, budget) for arm, budget in arms if values(arm, budget, "top1")]
    header = ["MACs", "arm", "seeds", "top-1", "less from scratch", "agreement", "KL", "KL, expected"]
    return f"## {NORMS[norm]}\n\n{markdown_table([header, *rows])}\n\n" if rows else ""


def _mean(values: Iterable[float], sign: str = "") -> str:
    if not (values := list(values)):
        return ""
    found = Interval.of(values)
    return f"{found.mean:{sign}.4f}" + (f" ± {found.half:.4f}" if found.n > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/compression_resnet8", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        made = [pool.submit(compute, norm, seed, pathlib.Path(args.runs)) for norm in NORMS for seed in SEEDS]
        for future in made:
            future.result()
    (RESULTS / "compression_resnet8.md").write_text(page(_results.known()))


if __name__ == "__main__":
    main()
