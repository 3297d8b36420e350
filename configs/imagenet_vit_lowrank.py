"""ViT-S/16 on ImageNet in 90 epochs, the kernels of attention and MLPs factored by kernel projection at a quarter of full rank.

Reproduces: the recipe of "Better plain ViT baselines for ImageNet-1k" (Beyer et al. 2022, arXiv 2205.01580): AdamW, RandAugment
(2, 10), mixup 0.2, no dropout, means over patches, fixed positions; `lowrank.method=none` is its network.  RandAugment is the
paper's here, whereas big_vision's, which follows TF's EfficientNet, also inverts, cuts out and adds to dark pixels, has no
identity, and at magnitude 10 always raises colour, contrast, brightness and sharpness (to 1.9) and solarises nothing.  Decay is
0.1 because it is multiplied by the rate here, and 1e-4 there, where it is not.

    scripts/prepare_imagenet.sh MANUAL_DIR DATA_DIR          # once
    lowrank train --config=imagenet_vit_lowrank --config.dataset.data_dir=DATA_DIR --workdir=gs://bucket/vit

Hardware: a TPU slice of 8 chips or more; what a chip needs is in docs/results/preflight.md.
Expected time: not yet measured; big_vision states 6-7 hours on TPU v3-8 for the dense network.
Expected number: not yet measured.  big_vision states 76.5 % top-1 for the dense network, with a hidden layer in the head, on
99 % of the training split (configs/vit_s16_i1k.py there).
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
    config.dataset.crop_area = (0.05, 1.0)
    config.dataset.randaugment_layers = 2
    config.dataset.randaugment_magnitude = 10.0
    config.dataset.mixup = 0.2
    config.model.name = "vit_s16"
    config.model.dtype = "bfloat16"
    config.model.kwargs = {"pool": "mean", "positions": "sincos"}
    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.warmup = "10000 steps"
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.lowrank.scale = 0.25
    config.lowrank.activation = "identity"
    config.lowrank.rules = (
        {"path": "(embed|head)/kernel", "method": "none"},
        {"path": ".*/mlp/fc1/kernel", "activation": "gelu"},
    )
    # Heads stay whole: by itself the model axis would cut every head, whose scores would then have to be summed.
    config.mesh.rules = (
        {"path": ".*/attention/(query|key|value)/kernel", "spec": ("fsdp", "model", None)},
        {"path": ".*/attention/(query|key|value)/bias", "spec": ("model", None)},
        {"path": ".*/attention/out/kernel", "spec": ("model", None, "fsdp")},
    )
    config.eval.batch_size = 1024
    config.log.every = "100 steps"
    return config.lock()
