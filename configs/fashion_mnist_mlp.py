"""A plain multilayer perceptron, 784-256x4-10 without normalisation, on Fashion-MNIST at a twentieth of full rank.

Where initialisation matters most: no normalisation repairs what it gets wrong.

    scripts/prepare_fashion_mnist.sh          # once
    lowrank train --config=configs/fashion_mnist_mlp.py --workdir=runs/fashion_mlp

Hardware: any; about 20 seconds on two CPU cores.  Expected: top-1 0.884 on the test set: seeds 0, 1 and 2 gave 0.8849, 0.8848
and 0.8830.  With them lowrank.method=spectral gave 0.8802, 0.8838 and 0.8803, and none, the dense network, 0.8991, 0.9002 and
0.8990.  No arm had its learning rate tuned, so this is no comparison of methods.
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
