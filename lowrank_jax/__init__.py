"""Low-rank neural networks in JAX: the same Flax model, with some kernels replaced by factor pairs."""

from lowrank_jax import inputs, projection, theory
from lowrank_jax.decay import add_frobenius_decay, add_nuclear_decay, frobenius_penalty, nuclear_penalty
from lowrank_jax.kernel import LowRankKernel
from lowrank_jax.linen.factorize import factorize
from lowrank_jax.linen.layers import LowRankConv, LowRankDense, apply
from lowrank_jax.linen.plan import plan
from lowrank_jax.planning import chips
from lowrank_jax.planning.execution import choose_execution
from lowrank_jax.planning.factorize import merge
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.rules import Rule
from lowrank_jax.projection import activations
from lowrank_jax.projection.sampled import function_approximation

__version__ = "0.1.0"

__all__ = [
    "LowRankConv",
    "LowRankDense",
    "LowRankKernel",
    "Plan",
    "Rule",
    "activations",
    "add_frobenius_decay",
    "add_nuclear_decay",
    "apply",
    "chips",
    "choose_execution",
    "factorize",
    "frobenius_penalty",
    "function_approximation",
    "inputs",
    "merge",
    "nuclear_penalty",
    "plan",
    "projection",
    "theory",
]
