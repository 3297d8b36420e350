"""Wide ResNet 28-10 on CIFAR-10, its convolutions factored by kernel projection at a tenth of full rank.

Reproduces: the recipe of Zagoruyko and Komodakis (2016, arXiv 1605.07146); `lowrank.method=none` is their network, and
`model.name=wrn_16_4` a quick one.

    tfds build cifar10 --file_format=array_record --data_dir=DATA_DIR          # once
    lowrank train --config=cifar10_wrn --config.dataset.data_dir=DATA_DIR --workdir=runs/cifar10_wrn

Hardware: one accelerator.
Expected time: not yet measured.
Expected number: not yet measured.  The authors state 96.00 % top-1 for the dense network (their README, median of five runs).
"""

from lowrank_jax.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.epochs = 200
    config.dataset.name = "cifar10"
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.model.name = "wrn_28_10"
    config.model.dtype = "bfloat16"
    config.optim.lr = 0.1
    config.optim.schedule = "step"
    config.optim.step_at = ("60 epochs", "120 epochs", "160 epochs")
    config.optim.step_factor = 0.2
    config.optim.weight_decay = 5e-4
    config.lowrank.scale = 0.1
    config.lowrank.rules = (
        {"path": "(stem|head)/kernel", "method": "none"},
        {"path": ".*/(conv2|proj)/kernel", "activation": "identity"},  # no ReLU follows their sum
    )
    config.log.every = "200 steps"
    return config.lock()
