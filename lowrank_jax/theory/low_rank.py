"""The best low-rank approximation of a ReLU network that is known only by samples."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank_jax import projection
from lowrank_jax.linalg import highest_precision
from lowrank_jax.paths import did_you_mean
from lowrank_jax.subspaces import SUBSPACES
from lowrank_jax.theory import moments
from lowrank_jax.theory.gap import risk_bound
from lowrank_jax.theory.learning import ReluNetwork, learn, silent
from lowrank_jax.theory.samples import Samples, from_arrays


@flax.struct.dataclass
class LowRankNetwork:
    """y = relu(x U V) A, and what it loses of the network relu(x W) A that was learned.

    The risk is that of the hidden layer, E |relu(x W) - relu(x U V)|² over Gaussian inputs of the samples' second moment, in
    closed form; what the outputs lose is at most that times the largest singular value of A, squared.

    Attributes:
      u, v: `[n, rank]` and `[rank, m]`.
      a: `[m, outputs]`, as learned.
      learned: the network that was learned.
      risk: of U V in place of W.
      optimum: the least risk that is known of any U V of this rank, that of a monotone descent (`subspace="refine"`).
      bound: no U V of this rank has less (`gap.risk_bound`).
      whole: the risk of 0 in place of W, for comparison.
    """

    u: jax.Array
    v: jax.Array
    a: jax.Array
    learned: ReluNetwork
    risk: float
    optimum: float
    bound: float
    whole: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., n] -> [..., outputs]`."""
        return _apply(x, self.u, self.v, self.a)


@jax.jit
@highest_precision
def _apply(x: jax.Array, u: jax.Array, v: jax.Array, a: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ u @ v) @ a


def learn_low_rank(
    x: Any,
    y: Any,
    width: int,
    rank: int,
    *,
    key: jax.Array,
    hidden_observed: bool = False,
    subspace: str = "refine",
    mesh: Mesh | None = None,
    say: Callable[[str], None] = silent,
) -> LowRankNetwork:
    """Learns the network (`learn_relu_network`, with its arguments, errors and warnings), then projects its kernel.

    The network that generated the samples need not be low-rank: the excess risk of the result over the best one goes to zero
    with the error in W (docs/mathematics.md, section 11).

    Args:
      rank: from 1 to min(n, width).
      subspace: as in `projection.kernel_projection`.

    Raises:
      ValueError: the rank is out of range or the subspace unknown; a SampleError is one too.
    """
    samples = from_arrays(x, y, mesh)
    if not 1 <= rank <= min(samples.inputs, width):  # before the long part
        raise ValueError(f"rank {rank}: must be from 1 to min({samples.inputs} inputs, width {width})")
    if subspace not in SUBSPACES:
        raise ValueError(f"unknown subspace {subspace!r}{did_you_mean(subspace, SUBSPACES)}")
    learned = learn(samples, width, key, hidden_observed, say)
    root = _root(samples)
    w = root @ learned.w
    u, v = projection.kernel_projection(w, rank, subspace=subspace)
    best = (u, v) if subspace == "refine" else projection.kernel_projection(w, rank, subspace="refine")
    back = jax.scipy.linalg.solve_triangular(root, u)
    risks = [projection.risk(w, y) for y in (u @ v, best[0] @ best[1], 0 * w)]
    risk, optimum, whole = (float(risk) for risk in risks)
    return LowRankNetwork(back, v, learned.a, learned, risk, optimum, float(risk_bound(w, rank)), whole)


def _root(samples: Samples) -> jax.Array:
    """C `[n, n]`, upper triangular, with CᵀC the inputs' second moment: I where the samples agree with it."""
    overview = moments.look(samples)
    if moments.agrees_with_identity(overview.covariance, overview.count):
        return jnp.eye(samples.inputs, dtype=samples.dtype)
    return jnp.asarray(np.linalg.cholesky(overview.covariance).T, samples.dtype)
