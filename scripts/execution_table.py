"""Writes docs/results/execution.md: the choice between factored and merged kernels in whole networks, on TPUs.

    python -m scripts.execution_table              # an hour on two cores; continues where it was stopped
    python -m scripts.execution_table --part=0/2   # every second result; another process can compute the others

Compiles the training step of three networks for three TPU generations at several scales: dense, all kernels factored, all
merged, and as chosen by the cost model (`auto`).  The numbers are the compiler's estimates, stored in
docs/results/execution.json.  Needs libtpu (pip install 'lowrank_jax[tpu-preflight]') and no TPU.
"""

import argparse
import fcntl
import itertools
import json
import os
import pathlib
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.preflight.compiler import compile_program, topology
from lowrank_jax.experiment.training.build import build
from lowrank_jax.planning.chips import CHIPS
from lowrank_jax.text import markdown_table

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
SCALES = (0.05, 0.25, 0.5)
ARMS = ("factored", "merged", "auto")
# Four chips, with as many images per chip as the config's batch on 16.
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
NETWORKS = {
    "ResNet-50": ("configs/imagenet_resnet50_lowrank.py", {"batch_size": "256"}),
    "EfficientNet-B0": ("configs/imagenet_efficientnet_lowrank.py", {"batch_size": "1024"}),
    "ViT-B/16": ("configs/imagenet_vit_lowrank.py", {"batch_size": "256", "model.name": "vit_b16"}),
}
LIMIT = 1.02

HEAD = """# Factored or merged: the gain of choosing on TPUs

Estimates of the TPU's compiler for a whole training step, in milliseconds, on one of four chips; nothing was run. They are its
sum over operations (`optimal_seconds`) at the lowest effort; `python -m scripts.execution_table` writes this page. Images per
chip: 64 for ResNet-50 and ViT-B/16, 256 for EfficientNet-B0. `factored` and `merged` are the pure choices; `auto` is chosen by
`choose_execution` kernel by kernel, with the cost model of [mathematics](../mathematics.md#10-what-a-layer-costs); the last
column counts the kernels that it runs factored. In parentheses: ratio to the dense network.

"""


def key(network: str, chip: str, arm: str, scale: float) -> str:
    return f"{network}/{chip}/{arm}/{scale:g}"


def wanted() -> list[tuple[str, str, str, float]]:
    pairs = [(network, chip) for chip in ("v5e", "v6e", "v4") for network in NETWORKS]
    dense = [(network, chip, "dense", 0.0) for network, chip in pairs]
    ends_first = sorted(SCALES, key=lambda scale: -abs(scale - 0.25))
    return dense + [(network, chip, arm, scale) for scale in ends_first for network, chip in pairs for arm in ARMS]


def estimate(network: str, chip: str, arm: str, scale: float) -> dict[str, Any]:
    """The compiler's estimate of a training step."""
    file, changes = NETWORKS[network]
    low_rank = {"lowrank.scale": str(scale), "lowrank.execution": arm} if arm != "dense" else {"lowrank.method": "none"}
    devices = topology(SLICES[chip])
    experiment = build(configs.read(file, changes | low_rank, devices=len(devices)), devices=devices)
    executions = {kernel.execution for kernel in experiment.plan.factored}
    pure = next(iter(executions)) if len(executions) == 1 else None
    if arm == "auto" and pure is not None and key(network, chip, pure, scale) in known():
        return known()[key(network, chip, pure, scale)]  # the same program
    program = compile_program(experiment.lower_train_step(), CHIPS[chip])
    cost = program.cost
    if cost is None or cost.seconds is None:
        raise SystemExit(f"{key(network, chip, arm, scale)}: no time: {cost.doubt if cost else 'it does not fit'}")
    return {
        "seconds": cost.seconds,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "peak_bytes": program.peak_bytes,
        "kernels": len(experiment.plan.factored),
        "factored": sum(kernel.execution == "factored" for kernel in experiment.plan.factored),
    }


def note(name: str, found: dict[str, Any]) -> None:
    """Adds a result to the file, which another process may be writing too."""
    with (RESULTS / "execution.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = {**read(file), name: found}
        file.truncate(0)
        file.write(json.dumps(known, indent=1, sort_keys=True) + "\n")


def read(file: Any) -> dict[str, Any]:
    file.seek(0)
    return json.loads(file.read() or "{}")


def known() -> dict[str, Any]:
    path = RESULTS / "execution.json"
    return json.loads(path.read_text()) if path.exists() else {}


def page(results: dict[str, Any]) -> str:
    """The complete rows as tables, and whether the choice is within the limit."""
    text, worst, missing = [], {"dense": 0.0, "factored": 0.0, "merged": 0.0}, 0
    for chip in SLICES:
        rows = [["network", "scale", "dense", "factored", "merged", "auto", "kernels factored"]]
        for network, scale in itertools.product(NETWORKS, SCALES):
            names = {"dense": key(network, chip, "dense", 0.0), **{arm: key(network, chip, arm, scale) for arm in ARMS}}
            if not set(names.values()) <= results.keys():
                missing += 1
                continue
            arms = {arm: results[name] for arm, name in names.items()}
            times = {arm: found["seconds"] for arm, found in arms.items()}
            worst = {arm: max(worst[arm], times["auto"] / times[arm]) for arm in worst}
            cells = [f"{1e3 * times[arm]:.2f} ({times[arm] / times['dense']:.3f})" for arm in ARMS]
            chosen = f"{arms['auto']['factored']} of {arms['auto']['kernels']}"
            rows.append([network, f"{scale:g}", f"{1e3 * times['dense']:.2f}", *cells, chosen])
        if rows[1:]:
            text.append(f"## {chip}\n\n{markdown_table(rows)}\n")
    figures = ", ".join(f"{ratio:.3f} of {arm}" for arm, ratio in worst.items())
    verdict = "within" if max(worst.values()) <= LIMIT else "**not** within"
    text.append(f"The worst estimates of `auto` are {figures}: {verdict} the required 2 per cent.\n")
    if missing:
        text.append(f"**Not complete:** {missing} rows of {len(SLICES) * len(NETWORKS) * len(SCALES)} are not compiled yet.\n")
    return HEAD + "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", help="I/N: compute every N-th result, starting from the I-th")
    part, parts = (int(number) for number in parser.parse_args().part.split("/"))
    for case in wanted()[part::parts]:
        if key(*case) in known():
            continue
        begin = time.process_time()
        found = estimate(*case)
        note(key(*case), found)
        print(f"{key(*case)}: {1e3 * found['seconds']:.2f} ms ({time.process_time() - begin:.0f} CPU-s)", flush=True)
    (RESULTS / "execution.md").write_text(page(known()))


if __name__ == "__main__":
    main()
