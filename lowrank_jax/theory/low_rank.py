"""The best low-rank approximation of a ReLU network that is known only from samples."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank_jax.projection import matrix
from lowrank_jax.projection.linalg import highest_precision, is_count, solve_gram
from lowrank_jax.projection.subspaces import SUBSPACES
from lowrank_jax.text import did_you_mean
from lowrank_jax.theory import hidden, moments
from lowrank_jax.theory.gap import risk_bound
from lowrank_jax.theory.learning import ReluNetwork, check_width, learn, silent
from lowrank_jax.theory.moments import Overview
from lowrank_jax.theory.samples import from_arrays


@flax.struct.dataclass
class LowRankNetwork:
    """y = relu(x U V) A, and its risks relative to the learned network relu(x W) A'.

    All risks are closed forms for Gaussian inputs with the samples' second moment.  `risk`, `optimum`, `bound` and `whole` are
    those of the hidden layer, E |relu(x W) - relu(x Y)|², which the projection minimises.

    Attributes:
      u, v: `[n, rank]` and `[rank, m]`.
      a: `[m, outputs]`, by least squares for this U V; the identity if the hidden layer is observed.
      learned: the network that was learned.
      risk: of Y = U V.
      optimum: the least known risk of any Y of this rank, found by a monotone descent (`subspace="refine"`).
      bound: a lower bound on the risk of any Y of this rank (`risk_bound`).
      whole: the risk of Y = 0, for comparison.
      output_risk: the mean squared error of all outputs, relative to their variance.
    """

    u: jax.Array
    v: jax.Array
    a: jax.Array
    learned: ReluNetwork
    risk: float
    optimum: float
    bound: float
    whole: float
    output_risk: float

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

    The network that generated the samples need not be low-rank: as the error in W goes to zero, the risk of the result goes to
    that of the best network of this rank (docs/mathematics.md, section 11).

    Args:
      rank: from 1 to min(n, width).
      subspace: as in `matrix.kernel_projection`.

    Raises:
      ValueError: the rank is out of range or the subspace unknown; a SampleError is one too.
    """
    samples = from_arrays(x, y, mesh)
    check_width(width)
    if not is_count(rank) or not rank <= min(samples.inputs, width):  # before the expensive part
        raise ValueError(f"rank must be a whole number from 1 to min({samples.inputs} inputs, width {width}), got {rank}")
    if subspace not in SUBSPACES:
        raise ValueError(f"unknown subspace {subspace!r}{did_you_mean(subspace, SUBSPACES)}")
    learned, overview = learn(samples, width, key, hidden_observed, say)
    return _project(learned, jnp.asarray(_root(overview), samples.dtype), rank, subspace, hidden_observed)


@highest_precision
def _project(learned: ReluNetwork, root: jax.Array, rank: int, subspace: str, keep: bool) -> LowRankNetwork:
    """For inputs with second moment RᵀR; A is kept or fitted again."""
    w = root @ learned.w
    u, v = matrix.kernel_projection(w, rank, subspace=subspace)
    best = (u, v) if subspace == "refine" else matrix.kernel_projection(w, rank, subspace="refine")
    risk, optimum, whole = (float(matrix.risk(w, y)) for y in (u @ v, best[0] @ best[1], 0 * w))
    a, output_risk = _outputs(w, learned.a, u @ v, keep)
    back = jax.scipy.linalg.solve_triangular(root, u)
    bound = float(risk_bound(w, rank))
    return LowRankNetwork(back, v, a, learned, risk, optimum, bound, whole, float(output_risk))


@functools.partial(jax.jit, static_argnames="keep")
@highest_precision
def _outputs(w: jax.Array, a: jax.Array, y: jax.Array, keep: bool) -> tuple[jax.Array, jax.Array]:
    """A by least squares for relu(x Y), unless it is kept, and the outputs' relative error."""
    gram, cross = hidden.products(y, y), hidden.products(y, w)
    fitted = a if keep else solve_gram(gram, cross @ a)
    lost = jnp.sum(a * (hidden.products(w, w) @ a)) - 2 * jnp.sum(fitted * (cross @ a)) + jnp.sum(fitted * (gram @ fitted))
    variance = jnp.sum(hidden.variance(w, a))
    return fitted, jnp.where(variance > 0, lost / variance, lost)


def _root(overview: Overview) -> np.ndarray:
    """R `[n, n]`, upper triangular, with RᵀR the inputs' second moment; I if the samples are compatible with that."""
    if moments.agrees_with_identity(overview.covariance, overview.count):
        return np.eye(len(overview.covariance))
    return np.linalg.cholesky(overview.covariance).T
