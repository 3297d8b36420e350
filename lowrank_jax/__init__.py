"""Low-rank neural networks in JAX: the same Flax model, with some kernels replaced by factor pairs."""

from lowrank_jax import projection
from lowrank_jax.decay import add_frobenius_decay, frobenius_penalty
from lowrank_jax.kernel import LowRankKernel
from lowrank_jax.layers import LowRankConv, LowRankDense, apply
from lowrank_jax.plans import Plan
from lowrank_jax.ranks import Rule
from lowrank_jax.surgery import factorize, merge, plan

__version__ = "0.1.0"

__all__ = [
    "LowRankConv",
    "LowRankDense",
    "LowRankKernel",
    "Plan",
    "Rule",
    "add_frobenius_decay",
    "apply",
    "factorize",
    "frobenius_penalty",
    "merge",
    "plan",
    "projection",
]
