"""The network."""

import flax.linen as nn


class Net(nn.Module):
    """Three convolutions and a classifier: images [batch, height, width, channels] to logits [batch, num_classes]."""

    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, images, train=False):
        x = images
        for name in ("stem", "middle", "last"):
            x = nn.Conv(self.width, (3, 3), strides=(2, 2), use_bias=False, name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))
