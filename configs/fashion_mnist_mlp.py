"""A plain multilayer perceptron, 784-256x4-10 without normalisation, on Fashion-MNIST at a twentieth of full rank.

Reproduces: nothing published.  Where initialisation matters most: no normalisation repairs what it gets wrong.

    scripts/prepare_fashion_mnist.sh          # once
    lowrank train --config=fashion_mnist_mlp --workdir=runs/fashion_mlp

Hardware: any.
Expected time: about 20 seconds on two CPU cores.
Expected number: top-1 0.885 on the test set: seeds 0, 1 and 2 gave 0.8844, 0.8850 and 0.8843.  With them
lowrank.method=spectral gave 0.8807, 0.8875 and 0.8821, and none, the dense network, 0.9002, 0.8994 and 0.8980.  No arm had its
learning rate tuned, so this is no comparison of methods.  Without optim.clip_norm seed 1 diverged at step 490, as the warm-up
ended.
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
    config.optim.clip_norm = 1.0
    config.lowrank.scale = 0.05
    config.lowrank.rules = ({"path": "head/kernel", "method": "none"},)
    config.log.every = "200 steps"
    return config.lock()
