"""One matrix becomes two factors: activations, linear algebra, subspaces and the methods."""

from lowrank_jax.projection.curves import curves
from lowrank_jax.projection.matrix import kernel_projection, on_subspace, relative_risk, risk, spectral

__all__ = ["curves", "kernel_projection", "on_subspace", "relative_risk", "risk", "spectral"]
