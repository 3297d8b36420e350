"""Low-rank neural networks in JAX: the same Flax model, with some kernels replaced by factor pairs."""

from lowrank_jax import activations, chips, inputs, projection, theory
from lowrank_jax.approximation import function_approximation
from lowrank_jax.decay import add_frobenius_decay, add_nuclear_decay, frobenius_penalty, nuclear_penalty
from lowrank_jax.execution import choose_execution
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
