"""Learning a one-hidden-layer ReLU network, and its best low-rank approximation, from noiseless samples.

Moments give directions, these give a start, and Gauss-Newton converges from it (docs/mathematics.md, section 11); then comes
the kernel projection (section 3).  The network that generates the samples need not be low-rank.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lowrank_jax.projection.linalg import highest_precision, is_count
from lowrank_jax.theory import moments, observed, search
from lowrank_jax.theory.gauss_newton import squared_error
from lowrank_jax.theory.moments import Overview
from lowrank_jax.theory.samples import SampleError, Samples, from_arrays, from_batches, rounding


@flax.struct.dataclass
class ReluNetwork:
    """y = relu(x W) A.

    Samples determine only the product of |w_j| and row j of A: the rows of A have length one.

    Attributes:
      w: `[n, m]`.
      a: `[m, outputs]`.
      residual: the mean of |y - relu(x W) A|² over all samples, relative to that of |y - E y|².
      converged: whether the residual is rounding, so that this is the function that generated the samples.  Then W and A are
        its weights too, up to the order of neurons, if the width is no larger than necessary.
    """

    w: jax.Array
    a: jax.Array
    residual: float
    converged: bool

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., n] -> [..., outputs]`."""
        return _apply(x, self.w, self.a)


@jax.jit
@highest_precision
def _apply(x: jax.Array, w: jax.Array, a: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ w) @ a


def silent(line: str) -> None:
    """Discards progress messages; the default of `say`."""


def learn_relu_network(
    x: Any,
    y: Any,
    width: int,
    *,
    key: jax.Array,
    hidden_observed: bool = False,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = silent,
) -> ReluNetwork:
    """Learns the network y = relu(x W) A from noiseless samples of Gaussian x.

    Inputs N(0, S) with any S are whitened first.  Computes in float64 if JAX has it enabled and the samples use it, else in
    float32.

    Args:
      x: `[N, n]`, a NumPy array, memory-mapped file or JAX array.
      y: `[N, outputs]`.
      width: m, at most n unless the hidden layer is observed.
      key: for the random parts of the search; the same key gives the same network.
      hidden_observed: y is the hidden layer relu(x W) itself, so width is the number of outputs.  Then inputs need not be
        Gaussian.
      mesh: devices over which samples are sharded, along the axis `data`.
      say: called with every progress message.

    Raises:
      SampleError: no network of that width can be learned from these samples; the message says why.

    Warns:
      NotGaussianWarning: the moments of the inputs are not those of a Gaussian with mean zero.
    """
    return learn(from_arrays(x, y, mesh), width, key, hidden_observed, say)[0]


def learn_from_batches(
    batches: Iterable[tuple[Any, Any]],
    width: int,
    *,
    key: jax.Array,
    hidden_observed: bool = False,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = silent,
) -> ReluNetwork:
    """`learn_relu_network` for samples that do not fit into memory.

    Args:
      batches: pairs of x `[any, n]` and y `[any, outputs]`; read several times, with the same result every time.
      width, key, hidden_observed, mesh, say: as in `learn_relu_network`.
    """
    return learn(from_batches(batches, mesh), width, key, hidden_observed, say)[0]


def learn(
    samples: Samples, width: int, key: jax.Array, hidden_observed: bool, say: Callable[[str], None]
) -> tuple[ReluNetwork, Overview]:
    """Implements both functions above; also returns the overview of the samples."""
    check_width(width)
    overview = moments.look(samples)
    if hidden_observed:
        w, a = observed.solve(samples, width), jnp.eye(width, dtype=samples.dtype)
    else:
        w = search.search(samples, overview, width, key, say)
        a = search.outputs_fitted(samples, w)
    return _network(samples, overview, w, a), overview


def check_width(width: Any) -> None:
    if not is_count(width):
        raise SampleError(f"width must be a whole number from 1, got {width!r}")


def start_from_moments(x: Any, y: Any, width: int, *, key: jax.Array, mesh: Mesh | None = None) -> ReluNetwork:
    """The network from moments alone, where `learn_relu_network` starts; its error is of the order of 1/√N.

    Arguments and errors as in `learn_relu_network`.
    """
    check_width(width)
    samples = from_arrays(x, y, mesh)
    overview = moments.look(samples)
    w = search.start(samples, overview, width, key)
    return _network(samples, overview, w, search.outputs_fitted(samples, w))


def _network(samples: Samples, overview: Overview, w: jax.Array, a: jax.Array) -> ReluNetwork:
    w, a = unit_rows(w, a)
    error = float(samples.mean(squared_error, w, a))
    residual = error / overview.variance if overview.variance > 0 else error
    return ReluNetwork(w, a, residual, residual <= rounding(samples.dtype))


@jax.jit
def unit_rows(w: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same function, with the lengths of the rows of A moved to the columns of W."""
    length = jnp.linalg.norm(a, axis=1)
    return w * length, a / jnp.where(length > 0, length, 1)[:, None]
