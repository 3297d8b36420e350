"""Whether the models here compute what timm's compute: random weights, copied, and the logits of both set side by side.

    pip install 'lowrank_jax[parity]'
    python -m scripts.timm_parity                    # ResNets, EfficientNet-B0 in both paddings, -Lite, ViTs
    python -m scripts.timm_parity resnet101 --size=128

Nothing is downloaded.  Weights are random, BatchNorm statistics and all biases and scales included, so that a layer which is
left out, padded differently or filled with another layer's weights shows.  Exits with 1 if a difference is above 1e-3
(of the logits' size, where they are larger than one: random deep networks may have large ones).
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lowrank_jax.exchange.timm import TWINS, from_timm, twin
from lowrank_jax.text import did_you_mean

TOLERANCE = 1e-3
DEFAULT = (
    "resnet50",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "efficientnet_b0",
    "tf_efficientnet_b0",
    *(f"tf_efficientnet_lite{size}" for size in range(5)),
    *(f"vit_{size}_patch{patch}_224" for size in ("small", "base", "large") for patch in (16, 32)),
)


class Parity(NamedTuple):
    """How two models agree: parameters, the size of timm's logits (root mean square), and the largest difference from them."""

    name: str
    parameters: int
    logits: float
    difference: float

    @property
    def agree(self) -> bool:
        """Whether the difference is within the tolerance: absolute, or relative to logits that are larger than one."""
        return self.difference <= TOLERANCE * max(1.0, self.logits)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=DEFAULT, help=f"of models in timm: {', '.join(TWINS)}")
    parser.add_argument("--size", type=int, default=224, help="the height and width of the images")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in TWINS:
            parser.error(f"no twin of {name!r}{did_you_mean(name, TWINS)}")
    if args.size < 32 or args.size % 32:
        parser.error(f"--size {args.size} must be a multiple of 32, at least 32")
    try:
        import_timm()
    except ImportError as error:
        parser.exit(2, f"{error}\n")
    print(f"{'model in timm':24}{'parameters':>12}{'logits, rms':>13}{'max difference':>16}")
    agree = True
    for name in args.names:
        parity = compare(name, args.size)
        agree &= parity.agree
        print(f"{name:24}{parity.parameters:12,}{parity.logits:13.3f}{parity.difference:16.1e}", flush=True)
    return int(not agree)


def compare(name: str, size: int, batch: int = 2, seed: int = 0, **settings: Any) -> Parity:
    """Copies a randomised timm model into its twin and runs both in evaluation mode, in float32.

    Args:
      name: of the model in timm.
      size: the height and width of the images.
      batch: how many.
      seed: of weights and images.
      **settings: of the twin, for what should make a difference.
    """
    model = randomised(name, size, seed)
    images = np.random.default_rng(seed).standard_normal((batch, size, size, 3), np.float32)
    theirs = timm_logits(model, images)
    ours = twin(name, num_classes=theirs.shape[-1], **settings)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    variables = from_timm(state, jax.eval_shape(ours.init, jax.random.key(0), images))
    with jax.default_matmul_precision("highest"):  # accelerators multiply float32 in fewer bits otherwise
        logits = np.asarray(jax.jit(ours.apply)(variables, images))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return Parity(name, parameters, float(np.sqrt(np.mean(theirs**2))), float(np.abs(logits - theirs).max()))


def randomised(name: str, size: int, seed: int) -> Any:
    """timm's model in evaluation mode: no two biases or scales alike, activations of the size that a trained network has."""
    timm, torch = import_timm()
    torch.manual_seed(seed)
    image_size = {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=1000, **image_size)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key == "cls_token" or key.endswith("bias"):
                value.normal_(std=0.1)
            elif value.ndim == 1:
                value.uniform_(0.5, 1.5)
        _set_statistics(model, torch.randn(4, 3, size, size), torch)
    return model.eval()


def _set_statistics(model: Any, images: Any, torch: Any) -> None:
    """Running statistics near those of the model's own activations: drawn freely, they would let a deep network explode."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the last batch
    if norms:
        model.train()(images)
    for norm in norms:
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)


def timm_logits(model: Any, images: np.ndarray) -> np.ndarray:
    """`[batch, height, width, channels] -> [batch, num_classes]`."""
    _, torch = import_timm()
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()


def import_timm() -> tuple[Any, Any]:
    """timm and torch.

    Raises:
      ImportError: they are not installed.
    """
    try:
        torch = importlib.import_module("torch")
        _declare_operators(torch)
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"{error}; the comparison needs timm and torch: pip install 'lowrank_jax[parity]'") from None
    return timm, torch


def _declare_operators(torch: Any) -> None:
    """Lets a torchvision that was built for another torch be imported, as timm does.

    Beside a torch for CPUs alone, torchvision from PyPI misses the operators of its compiled part.  No model here uses them:
    that they are declared is enough.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    sys.exit(main())
