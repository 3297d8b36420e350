"""Training steps of whole networks, compiled for TPUs that need not be there; what the scripts of docs/results share."""

import argparse
import fcntl
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.preflight.compiler import compile_program, topology
from lowrank_jax.experiment.training.build import build
from lowrank_jax.planning.chips import CHIPS

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
# Four chips, with as many images per chip as the config's batch on 16.
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
CHIPS_OF_SLICE = 4
NETWORKS = {
    "ResNet-50": ("configs/imagenet_resnet50_lowrank.py", {"batch_size": "256"}),
    "EfficientNet-B0": ("configs/imagenet_efficientnet_lowrank.py", {"batch_size": "1024"}),
    "ViT-B/16": ("configs/imagenet_vit_lowrank.py", {"batch_size": "256", "model.name": "vit_b16"}),
}


def read(network: str, changes: Mapping[str, Any]) -> configs.Config:
    """The config of a network on four chips."""
    file, own = NETWORKS[network]
    return configs.read(file, {**own, **changes}, devices=CHIPS_OF_SLICE)


def estimate(name: str, config: configs.Config, chip: str) -> dict[str, Any]:
    """The compiler's estimate of the config's training step on one of four chips."""
    experiment = build(config, devices=topology(SLICES[chip]))
    program = compile_program(experiment.lower_train_step(), CHIPS[chip])
    cost, factored = program.cost, experiment.plan.factored
    if cost is None or cost.seconds is None:
        raise SystemExit(f"{name}: no time: {cost.doubt if cost else 'it does not fit'}")
    return {
        "seconds": cost.seconds,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "peak_bytes": program.peak_bytes,
        "kernels": len(factored),
        "factored": sum(kernel.execution == "factored" for kernel in factored),
        "params": experiment.plan.params / experiment.plan.dense_params,
    }


class Results:
    """Figures by name in a JSON file of docs/results, which several processes may write."""

    def __init__(self, file: str):
        self._path = RESULTS / file

    def known(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def note(self, name: str, found: dict[str, Any]) -> None:
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = {**json.loads(file.read() or "{}"), name: found}
            file.truncate(0)
            file.write(json.dumps(known, indent=1, sort_keys=True) + "\n")

    def compute(self, doc: str | None, cases: Iterable[str], of: Callable[[str], dict[str, Any]]) -> None:
        """The command line: computes what is not known yet, or the part of it that is asked for."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--part", default="0/1", help="I/N: compute every N-th result, starting from the I-th")
        part, parts = (int(number) for number in parser.parse_args().part.split("/"))
        for name in list(cases)[part::parts]:
            if name in self.known():
                continue
            begin = time.process_time()
            found = of(name)
            self.note(name, found)
            print(
                f"{name}: {1e3 * found.get('seconds', math.inf):.2f} ms ({time.process_time() - begin:.0f} CPU-s)", flush=True
            )
