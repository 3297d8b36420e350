"""One matrix becomes two factors: activations, linear algebra, subspaces and the methods."""

from lowrank_jax.projection.curves import curves
from lowrank_jax.projection.matrix import kernel_projection, on_subspace, relative_risk, risk, spectral
from lowrank_jax.projection.two_sided import two_sided

__all__ = ["curves", "kernel_projection", "on_subspace", "relative_risk", "risk", "spectral", "two_sided"]
