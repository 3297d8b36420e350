"""ResNet-8 on scikit-learn's digits, its convolutions factored by kernel projection at a quarter of full rank.

Reproduces: nothing published.  The smallest real experiment: its data ships with scikit-learn.

    lowrank train --config=digits_resnet --workdir=runs/digits

Hardware: any.
Expected time: half a minute on two CPU cores.
Expected number: top-1 of at least 0.95 on the 360 held-out digits; seed 0 gave 0.9917.
"""

from lowrank_jax.config import default


def get_config():
    config = default()
    config.batch_size = 64
    config.epochs = 30
    config.dataset.name = "digits"
    config.dataset.crop_padding = 1
    config.model.name = "resnet8"
    config.optim.lr = 0.1
    config.optim.warmup = "2 epochs"
    config.optim.weight_decay = 5e-4
    config.lowrank.scale = 0.25
    config.lowrank.rules = ({"path": "(stem/conv|head)/kernel", "method": "none"},)
    config.eval.every = "5 epochs"
    config.checkpoint.every = "5 epochs"
    config.log.every = "2 epochs"
    return config.lock()
