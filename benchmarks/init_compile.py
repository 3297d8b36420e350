"""The TPU compiler's time for the initialiser of ResNet-50 at scale 0.1, with decompositions on the device and on the host.

    python -m benchmarks.init_compile [CONFIG] [--effort=full] [--topology=v5e:2x2]

CONFIG is a file, default configs/imagenet_resnet50_lowrank.py.  No TPU is needed and nothing is run: the figures are
CPU-seconds of this machine and counts of decompositions in the program.  Effort full takes minutes.
"""

import argparse
import dataclasses
import os
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import InitConfig
from lowrank_jax.experiment.preflight import compiler
from lowrank_jax.experiment.training.build import build

DECOMPOSITIONS = {
    "eigenvectors": "@Eigh",
    "QR": "@Qr|geqrf",
    "Cholesky": "stablehlo.cholesky",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/imagenet_resnet50_lowrank.py")
    parser.add_argument("--effort", choices=compiler.EFFORTS, default="fast")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--svd", choices=("device", "host"), nargs="*", default=["device", "host"])
    flags = parser.parse_args()
    parsed, devices = configs.read(flags.config), compiler.topology(flags.topology)
    for svd in flags.svd:
        experiment = build(dataclasses.replace(parsed, init=InitConfig(svd)), devices=devices)
        lowered = experiment.lower_init()
        text = lowered.as_text()
        counts = ", ".join(f"{len(re.findall(pattern, text))} {name}" for name, pattern in DECOMPOSITIONS.items())
        begin = time.process_time()
        with compiler.compiling(flags.effort):
            lowered.compile()
        seconds = time.process_time() - begin
        print(
            f"{flags.config} for {flags.topology}, init.svd={svd}, effort {flags.effort}: {seconds:.0f} CPU-s; {counts}",
            flush=True,
        )


if __name__ == "__main__":
    main()
