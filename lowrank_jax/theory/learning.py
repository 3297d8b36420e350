"""Learning a one-hidden-layer ReLU network, and its best low-rank approximation, from noiseless samples.

Moments give directions, directions a start, Gauss–Newton the rest (docs/mathematics.md, section 11); then the kernel projection
(section 3).  The network that generates the samples need not be low-rank.
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

    Only |w_j| times row j of A can be known from samples: the rows of A have length one.

    Attributes:
      w: `[n, m]`.
      a: `[m, outputs]`.
      residual: the mean of |y - relu(x W) A|² over all samples, of which the mean of |y - E y|² is 1.
      converged: whether that is rounding, so that the function is the one that generated the samples; and so are W and A, up to
        the order of neurons, where the width is no larger than it has to be.
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
    """Where lines of progress go unless somebody wants them."""


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
    """The network y = relu(x W) A from noiseless samples of Gaussian x.

    Inputs N(0, S) of any S are whitened first.  Computed in float64 where jax has it enabled and the samples have it, else in
    float32.

    Args:
      x: `[N, n]`, numpy's, a mapped file's or jax's.
      y: `[N, outputs]`.
      width: m, at most n unless the hidden layer is observed.
      key: of what is random in the search; the same key gives the same network.
      hidden_observed: y = relu(x W) itself, and width the number of outputs.  Then inputs need not be Gaussian.
      mesh: devices that share the samples, over the axis `data`.
      say: takes lines of progress.

    Raises:
      SampleError: no network of that width can be learned from these samples, for the reason it gives.

    Warns:
      NotGaussianWarning: a moment test says that the inputs are not Gaussian with mean zero.
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
    """`learn_relu_network` of samples that do not fit into memory.

    Args:
      batches: pairs of x `[any, n]` and y `[any, outputs]`; read several times, and every time the same.
      width, key, hidden_observed, mesh, say: as there.
    """
    return learn(from_batches(batches, mesh), width, key, hidden_observed, say)[0]


def learn(
    samples: Samples, width: int, key: jax.Array, hidden_observed: bool, say: Callable[[str], None]
) -> tuple[ReluNetwork, Overview]:
    """Both of the above, and what was seen of the samples on the way."""
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
    """The network that moments alone suggest, from which `learn_relu_network` sets out; its error is of the order of 1/√N.

    Arguments and errors are as there.
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
    """The same function, with rows of A of length one and the lengths in W's columns."""
    length = jnp.linalg.norm(a, axis=1)
    return w * length, a / jnp.where(length > 0, length, 1)[:, None]
