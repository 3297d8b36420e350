"""ResNet-20 on CIFAR-10, its convolutions factored by kernel projection at a quarter of full rank.

Reproduces: the recipe of He et al. (2016, arXiv 1512.03385) with Nesterov's momentum.  `lowrank.method=none` is their network
with 1x1 convolutions on two shortcuts, where theirs have none: 272 thousand parameters.

    tfds build cifar10 --file_format=array_record --data_dir=DATA_DIR          # once
    lowrank train --config=cifar10_resnet --config.dataset.data_dir=DATA_DIR --workdir=runs/cifar10_resnet

Hardware: one accelerator.
Expected time: not yet measured.
Expected number: not yet measured.  He et al. state 91.25 % top-1 for their dense network.
"""

from lowrank_jax.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.steps = 64_000
    config.dataset.name = "cifar10"
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.model.name = "resnet20"
    config.optim.lr = 0.1
    config.optim.schedule = "step"
    config.optim.step_at = ("32000 steps", "48000 steps")
    config.optim.weight_decay = 1e-4
    config.lowrank.scale = 0.25
    config.lowrank.rules = ({"path": "(stem/conv|head)/kernel", "method": "none"},)
    config.log.every = "200 steps"
    return config.lock()
