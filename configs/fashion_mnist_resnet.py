"""ResNet-20 on Fashion-MNIST, its convolutions factored by kernel projection at a quarter of full rank.

Reproduces: nothing published.

    scripts/prepare_fashion_mnist.sh          # once
    lowrank train --config=fashion_mnist_resnet --workdir=runs/fashion_resnet

Hardware: one accelerator.
Expected time: not yet measured; hours on two CPU cores.
Expected number: not yet measured.
"""

from lowrank_jax.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.epochs = 30
    config.dataset.name = "fashion_mnist"
    config.dataset.flip = True
    config.dataset.crop_padding = 2
    config.model.name = "resnet20"
    config.optim.lr = 0.1
    config.optim.warmup = "1 epoch"
    config.optim.weight_decay = 5e-4
    config.lowrank.scale = 0.25
    config.lowrank.rules = ({"path": "(stem/conv|head)/kernel", "method": "none"},)
    config.log.every = "100 steps"
    return config.lock()
