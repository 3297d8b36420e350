"""Training steps of whole networks, compiled for TPUs that need not be there; what the scripts of docs/results share."""

import os
from collections.abc import Mapping
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.preflight.compiler import compile_program, topology
from lowrank_jax.experiment.training.build import build
from lowrank_jax.planning.chips import CHIPS

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
