"""ResNet-50 on ImageNet, its convolutions factored by kernel projection at a tenth of full rank; the stem and the head are not.

Reproduces: the experiment of arXiv 2202.00834 with the recipe of imagenet_resnet50, which is its dense arm.

    scripts/prepare_imagenet.sh MANUAL_DIR DATA_DIR          # once
    lowrank train --config=imagenet_resnet50_lowrank --config.dataset.data_dir=DATA_DIR --workdir=gs://bucket/r50_010
    lowrank sweep --config=imagenet_resnet50_lowrank --workdir=gs://bucket/r50 --emit=jobset ... \\
        --sweep='lowrank.scale=0.05,0.1,0.25; lowrank.method=none,spectral,kernel_projection; seed=0:3'

Hardware: as for the dense arm.
Expected time: not yet measured.  The TPU compiler expects little gain over the dense network, since both wait for memory.
Expected number: not yet measured.
"""

from lowrank_jax.config import load


def get_config():
    config = load("imagenet_resnet50").unlock()
    config.lowrank.method = "kernel_projection"
    config.lowrank.scale = 0.1
    config.lowrank.rules = ({"path": "(stem/conv|head)/kernel", "method": "none"},)
    return config.lock()
