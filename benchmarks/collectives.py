"""What eight TPU chips send each other in a training step of ResNet-50: factored, dense, and what the parameters weigh.

    JAX_PLATFORMS=cpu python -m benchmarks.collectives

From the programs that the TPU's compiler makes for v5e:2x4 at its lowest effort; nothing runs, and no TPU is needed.
"""

import pathlib

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.hosts.sharding import bytes_per_device
from lowrank_jax.experiment.preflight import compiler
from lowrank_jax.experiment.preflight.collectives import collectives
from lowrank_jax.experiment.training.build import Experiment, build
from lowrank_jax.text import align

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "imagenet_resnet50_lowrank.py"
# Factored throughout: of a merged kernel the devices sum the product's gradient, which is as large as the dense one.
ARMS = {
    "dense": {"lowrank.method": "none"},
    **{str(scale): {"lowrank.scale": scale, "lowrank.execution": "factored"} for scale in (0.05, 0.1, 0.25, 0.5)},
    "0.1 auto": {"lowrank.scale": 0.1, "lowrank.execution": "auto"},
}
# The data axis for all arms, the others for two of them: a compilation takes most of a minute.
MESHES = {"data": tuple(ARMS), "fsdp": ("dense", "0.1"), "model": ("dense", "0.1")}
MB = 1e6


def main() -> None:
    devices = compiler.topology("v5e:2x4")
    rows = [
        [
            "all devices on",
            "scale",
            "parameters MB",
            "BatchNorm MB",
            "all-reduce MB",
            "all-gather MB",
            "others MB",
            "all / dense",
        ]
    ]
    for axis, arms in MESHES.items():
        dense = None
        for arm in arms:
            experiment = compiled(axis, arm, devices)
            with compiler.compiling("fast"):
                found = collectives(str(experiment.lower_train_step().compile().as_text()))
            total = sum(found.values())
            dense = dense or total
            shapes = experiment.shapes
            whole = 4 * experiment.plan.params
            sizes = [whole, bytes_per_device(shapes.batch_stats), found.pop("all-reduce", 0), found.pop("all-gather", 0)]
            rows.append([axis, arm, *(f"{size / MB:.1f}" for size in (*sizes, sum(found.values()))), f"{total / dense:.3f}"])
            print(align(rows).splitlines()[-1], flush=True)
    print(align(rows))


def compiled(axis: str, arm: str, devices) -> Experiment:
    mesh = {f"mesh.{name}": len(devices) if name == axis else 1 for name in MESHES}
    return build(configs.read(str(CONFIG), {**ARMS[arm], **mesh}, devices=len(devices)), devices=devices)


if __name__ == "__main__":
    main()
