"""A trained network, to be called on images."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.config.trust import Trust
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.evaluation import classes, selection
from lowrank_jax.experiment.evaluation.predictions import Prediction, predictions
from lowrank_jax.experiment.hosts.sharding import batch_sharding, batch_shards, put_batch, replicated
from lowrank_jax.experiment.training.stored import open_network
from lowrank_jax.linen.factorize import merge
from lowrank_jax.planning.plans import Plan


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A trained network.

    Attributes:
      model: the Linen module.
      variables: `params`, with a `LowRankKernel` where a kernel is factored, `batch_stats`, and the model's other collections.
        `lowrank_jax.apply(net.model, net.variables, x, train=False)` runs it on images that are normalised already.
      plan: which kernels are factored.
      config: of the run; its own description of the data looks at the data, and imports code of it.
      dataset: what it was trained on, as the run recorded it.
      step: the checkpoint's.
      damaged: the reason by newer step that could not be used.
    """

    model: nn.Module
    variables: dict[str, Any] = dataclasses.field(repr=False)
    plan: Plan = dataclasses.field(repr=False)
    config: Config = dataclasses.field(repr=False)
    dataset: Dataset
    step: int
    damaged: dict[int, str]
    _forward: Callable[[dict[str, Any], jax.Array], jax.Array] = dataclasses.field(repr=False)
    _mesh: Mesh = dataclasses.field(repr=False)

    def __repr__(self) -> str:
        return f"<TrainedNetwork {type(self.model).__name__} of {self.dataset.name}, step {self.step}>"

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels; their numbers where the data set has no names, nothing where labels are no classes."""
        return classes.names_of(self.dataset)

    def __call__(self, images: Any) -> Any:
        """The network's outputs for raw images, as it is evaluated: normalised, without dropout or augmentation.

        Args:
          images: `[batch, *dataset.image_shape]`, of the data set's type: uint8, or floating-point numbers.  Any batch size:
            NumPy's arrays go through the network in parts of at most `eval.batch_size`, jax's as they are.

        Returns:
          Float32 `[batch, classes]`, or whatever the network returns; NumPy's for NumPy's, jax's for jax's.

        Raises:
          UserError: the images have another shape or type.
        """
        self._check(images)
        if isinstance(images, jax.Array):
            if not len(images):  # of which models may not be able to make anything
                return jax.tree.map(lambda array: array[:0], self(jax.numpy.zeros((1, *images.shape[1:]), images.dtype)))
            divides = len(images) % batch_shards(self._mesh) == 0
            sharding = batch_sharding(self._mesh) if divides else replicated(self._mesh)
            return self._forward(self.variables, jax.device_put(images, sharding))
        parts = [self._on_devices(part) for part in self._parts(np.asarray(images))]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def warnings(self) -> list[str]:
        """A line for each damaged step."""
        return selection.warnings(self.damaged)

    def merged(self) -> "TrainedNetwork":
        """The same network with its factors multiplied out: plain kernels, as the model without this project has them."""
        return dataclasses.replace(self, variables={**self.variables, "params": merge(self.variables["params"])})

    def predict(self, paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str], top: int = 5) -> list[Prediction]:
        """The likeliest classes of image files, which are decoded and cropped as in evaluation.

        Args:
          paths: files, and folders that hold some.
          top: how many classes of each.

        Returns:
          One for each file, in order; what cannot be decoded has its `error`.

        Raises:
          UserError: the network does not choose between classes, takes no images from files, or there are no files.
        """
        return list(predictions(self, [paths] if isinstance(paths, str | os.PathLike) else paths, top))

    def _check(self, images: Any) -> None:
        dtype, shape = getattr(images, "dtype", None), getattr(images, "shape", None)
        if dtype is None or shape is None:
            raise UserError(f"images must be an array, not a {type(images).__name__}")
        expected = self.dataset.image_shape
        if tuple(shape[1:]) != expected or not len(shape):
            hint = "; images[None] makes a batch of one" if tuple(shape) == expected else ""
            raise UserError(f"images have the shape {list(shape)}; expected [batch, {', '.join(map(str, expected))}]{hint}")
        if self.dataset.image_dtype == "uint8":
            if dtype != np.uint8:
                raise UserError(f"images are {dtype}; {self.dataset.name} has uint8, from 0 to 255")
        elif not jax.numpy.issubdtype(dtype, jax.numpy.floating):
            raise UserError(f"images are {dtype}; {self.dataset.name} has floating-point numbers")

    def _parts(self, images: np.ndarray) -> Iterator[np.ndarray]:
        """At least one, which is empty if there are no images."""
        size = self.batch_size
        return (images[start : start + size] for start in range(0, max(1, len(images)), size))

    @property
    def batch_size(self) -> int:
        """How many images go through the network at a time."""
        return -(-self.config.eval.batch_size // self._mesh.size) * self._mesh.size

    def _on_devices(self, images: np.ndarray) -> Any:
        """In a batch whose size is a power of two for each device, so that few sizes are compiled."""
        each = max(1, -(-len(images) // self._mesh.size))
        size = min(self.batch_size, self._mesh.size * 2 ** (each - 1).bit_length())
        dtype = self.dataset.image_dtype
        padded = np.zeros((size, *images.shape[1:]), dtype)
        padded[: len(images)] = images
        outputs = self._forward(self.variables, put_batch({"image": padded}, self._mesh)["image"])
        return jax.tree.map(lambda array: np.asarray(array)[: len(images)], outputs)


def restore(workdir: str, step: str = "latest", *, raw: bool = False, trust_code: Trust = False) -> TrainedNetwork:
    """See `lowrank_jax.experiment.restore`."""
    opened = open_network(workdir, step, trust_code, jax.local_devices())
    experiment = opened.experiment
    return TrainedNetwork(
        experiment.model,
        opened.variables(raw=raw),
        experiment.plan,
        opened.config,
        experiment.dataset,
        opened.restored.step,
        opened.restored.damaged,
        experiment.jit_forward(),
        experiment.mesh,
    )
