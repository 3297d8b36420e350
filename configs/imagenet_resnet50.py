"""ResNet-50 (v1.5) on ImageNet in 90 epochs, dense.

Reproduces: the usual recipe (Goyal et al. 2017, arXiv 1706.02677: warm-up, last scales of blocks from zero, no decay of norms)
at a batch of 1024, with Nesterov's momentum, a cosine schedule and label smoothing.

    scripts/prepare_imagenet.sh MANUAL_DIR DATA_DIR          # once
    lowrank train --config=imagenet_resnet50 --config.dataset.data_dir=DATA_DIR --workdir=gs://bucket/resnet50

Hardware: a TPU slice of 8 chips or more, such as v5e:4x4; the TPU compiler's estimates are in docs/results/preflight.md.
Expected time: not yet measured; Flax's ImageNet example states 2.1 hours on TPU v3-32 for 100 epochs.
Expected number: not yet measured here.  Recipes like this one state 76.54 % top-1 (Flax's ImageNet example, batch 1024, 100
epochs) and 76.2-76.4 % (dm-haiku's, batch 1024).

    lowrank evaluate --workdir=gs://bucket/resnet50 --dataset=imagenet_v2
"""

from lowrank_jax.config import default


def get_config():
    config = default()
    config.batch_size = 1024
    config.epochs = 90
    config.dataset.name = "imagenet2012"
    config.dataset.eval_split = "validation"
    config.dataset.flip = True
    config.dataset.image_size = 224
    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.kwargs = {"zero_init_last_norm": True}
    config.optim.lr = 0.1
    config.optim.lr_per_images = 256
    config.optim.warmup = "5 epochs"
    config.optim.weight_decay = 1e-4
    config.optim.label_smoothing = 0.1
    config.lowrank.method = "none"
    config.eval.batch_size = 1024
    config.log.every = "100 steps"
    return config.lock()
