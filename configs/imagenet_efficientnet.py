"""EfficientNet on ImageNet, dense; the variant is the argument: `:b0` (the default) to `:b8`, `:l2`, and an extrapolated `:b9`.

Reproduces: the published TensorFlow recipe (Tan and Le 2019, arXiv 1905.11946) but for AutoAugment: RMSProp with 0.9, momentum
0.9 and epsilon 0.001, a rate of 0.016 per 256 images, times 0.97 every 2.4 epochs, decay of kernels 1e-5, averages of the
weights with 0.9999.

    scripts/prepare_imagenet.sh MANUAL_DIR DATA_DIR          # once
    lowrank train --config=imagenet_efficientnet:b0 --config.dataset.data_dir=DATA_DIR --workdir=gs://bucket/b0

Hardware: TPU slices; what a chip needs for B0 is in docs/results/preflight.md, and `lowrank preflight` tells it of the others.
Larger variants take more chips, or a smaller batch (`--config.batch_size=1024`, which keeps the rate per image), or the batch
in parts (`--config.optim.accumulate=4`).
Expected time: not yet measured.
Expected number: not yet measured here.  Published for B0: 77.1 % top-1 with AutoAugment (arXiv 1905.11946); mmclassification
(readthedocs, papers/efficientnet) states 76.74 % for the published weights that were trained without it.
"""

from lowrank_jax.config import default
from lowrank_jax.models.efficientnet import VARIANTS


def get_config(variant="b0"):
    name = f"efficientnet_{variant}"
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}; there are {', '.join(key.partition('_')[2] for key in VARIANTS)}")
    size = VARIANTS[name].resolution
    config = default()
    config.batch_size = 4096
    config.epochs = 350
    config.dataset.name = "imagenet2012"
    config.dataset.eval_split = "validation"
    config.dataset.flip = True
    config.dataset.image_size = size
    config.dataset.eval_crop = size / (size + 32)
    config.model.name = name
    config.model.dtype = "bfloat16"
    config.optim.name = "rmsprop"
    config.optim.lr = 0.016
    config.optim.lr_per_images = 256
    config.optim.b2 = 0.9
    config.optim.momentum = 0.9
    config.optim.nesterov = False
    config.optim.eps = 1e-3
    config.optim.schedule = "exponential"
    config.optim.step_every = "2.4 epochs"
    config.optim.step_factor = 0.97
    config.optim.warmup = "5 epochs"
    config.optim.weight_decay = 1e-5
    config.optim.label_smoothing = 0.1
    config.optim.ema_decay = 0.9999
    config.lowrank.method = "none"
    config.eval.batch_size = 1024
    config.log.every = "100 steps"
    return config.lock()
