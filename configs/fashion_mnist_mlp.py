"""A plain multilayer perceptron, 784-256x4-10 without normalisation, on Fashion-MNIST at a twentieth of full rank.

Where initialisation matters most: no normalisation repairs what it gets wrong.

    scripts/prepare_fashion_mnist.sh          # once
    lowrank train --config=configs/fashion_mnist_mlp.py --workdir=runs/fashion_mlp

Hardware: any.  Expected number: see CHANGELOG.md for what was measured, with its conditions.
"""

from lowrank_jax.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.epochs = 20
    config.dataset.name = "fashion_mnist"
    config.model.name = "mlp"
    config.model.kwargs = {"widths": (256, 256, 256, 256)}
    config.optim.lr = 0.05
    config.optim.warmup = "1 epoch"
    config.lowrank.scale = 0.05
    config.lowrank.rules = ({"path": "head/kernel", "method": "none"},)
    config.log.every = "200 steps"
    return config.lock()
