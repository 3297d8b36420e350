"""The theory as code: learning the best low-rank ReLU network from samples, and the gain of the kernel projection."""

from lowrank_jax.theory.examples import draw_network, draw_samples
from lowrank_jax.theory.gap import gaussian_gap, relative_gap, risk_bound, sampled_gap
from lowrank_jax.theory.learning import ReluNetwork, learn_from_batches, learn_relu_network, start_from_moments
from lowrank_jax.theory.low_rank import LowRankNetwork, learn_low_rank
from lowrank_jax.theory.moments import NotGaussianWarning
from lowrank_jax.theory.samples import SampleError

__all__ = [
    "LowRankNetwork",
    "NotGaussianWarning",
    "ReluNetwork",
    "SampleError",
    "draw_network",
    "draw_samples",
    "gaussian_gap",
    "learn_from_batches",
    "learn_low_rank",
    "learn_relu_network",
    "relative_gap",
    "risk_bound",
    "sampled_gap",
    "start_from_moments",
]
