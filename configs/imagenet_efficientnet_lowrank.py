"""EfficientNet on ImageNet with its pointwise convolutions factored by kernel projection at a quarter of full rank.

Expansion and projection of every block and the convolution before the head are factored, each for what follows it: SiLU,
nothing, SiLU.  Depthwise kernels cannot be; `:b0,se` (any variant) factors squeeze-and-excitation too.

Reproduces: the experiment of arXiv 2202.00834 with the recipe of imagenet_efficientnet, which is its dense arm.

    scripts/prepare_imagenet.sh MANUAL_DIR DATA_DIR          # once
    lowrank train --config=imagenet_efficientnet_lowrank:b0 --config.dataset.data_dir=DATA_DIR --workdir=gs://bucket/b0

Hardware: as for the dense arm.
Expected time: not yet measured.
Expected number: not yet measured.
"""

from lowrank_jax.config import load


def get_config(argument="b0"):
    variant, *options = argument.split(",")
    if options not in ([], ["se"]):
        raise ValueError(f"after the variant only 'se' may follow, not {','.join(options)!r}")
    config = load(f"imagenet_efficientnet:{variant}").unlock()
    config.lowrank.method = "kernel_projection"
    config.lowrank.scale = 0.25
    squeeze = [{"path": ".*/se/reduce/kernel", "activation": "silu"}, {"path": ".*/se/excite/kernel", "activation": "sigmoid"}]
    config.lowrank.rules = (
        {"path": ".*/expand/kernel|top/conv/kernel", "activation": "silu"},
        {"path": ".*/project/kernel", "activation": "identity"},
        *(squeeze if options else ()),
        {"path": ".*", "method": "none"},
    )
    return config.lock()
