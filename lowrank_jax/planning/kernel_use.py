"""How a model uses one of its kernels."""

import dataclasses
import math

from lowrank_jax.kernel import MatrixView, channel_view, spatial_view
from lowrank_jax.projection.curves import Normalization


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """What tracing saw of one kernel.

    Attributes:
      module: the class that owns it, for messages.
      shape: its shape inside the module, without stack axes.
      rows: the axes that a dense layer sums over; None for convolutions.
      refusal: why it cannot be factored; empty if it can.
      own_run: whether only the layer knows how it computes with the kernel.
      positions: at how many output positions the kernel is applied, over the whole traced batch.
      widened: the same for the first stage of the spatial scheme, which keeps the input's width.
      inputs: how many elements the layer reads, over the whole traced batch.
      normalized: which normalisation follows the layer; None if none was found.
    """

    module: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None
    refusal: str
    own_run: bool = False
    positions: int = 0
    widened: int = 0
    inputs: int = 0
    normalized: Normalization | None = None

    def view(self, scheme: str) -> MatrixView:
        """The kernel as a matrix.

        Raises:
          ValueError: the spatial scheme is asked of a convolution that is not two-dimensional.
        """
        if self.rows is not None:
            return MatrixView(self.shape, self.rows)
        if scheme == "channel":
            return channel_view(self.shape)
        if len(self.shape) != 4:
            raise ValueError("the spatial scheme needs a 2-D convolution")
        return spatial_view(self.shape)

    def macs(self) -> int:
        """Multiply-accumulates of the dense kernel over the traced batch; 0 if unknown."""
        return self.positions * math.prod(self.shape)

    def hidden_positions(self, view: MatrixView) -> int:
        """At how many positions the first stage has outputs, over the traced batch."""
        return self.widened if view.group > 1 else self.positions
