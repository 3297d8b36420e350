"""A ReLU layer whose outputs are observed: y = relu(x W), solved column by column by least squares.

Where y_ij > 0 it equals x_i·w_j, so n such samples in general position determine w_j: about 2n samples of symmetric inputs.
"""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from lowrank_jax.projection.linalg import highest_precision
from lowrank_jax.theory.samples import SampleError, Samples

_AMPLE = 2  # active samples per unknown of w_j: without noise, more do not help


def solve(samples: Samples, width: int) -> jax.Array:
    """W `[n, width]`; a column that is never active is zero.

    Raises:
      SampleError: y does not have that width or is not the output of a ReLU, or too few samples are active.
    """
    if samples.outputs != width:
        raise SampleError(
            f"with hidden_observed, y needs one column per hidden unit: it has {samples.outputs}, and width is {width}"
        )
    x, y = _enough(samples)
    if len(x) < samples.inputs:
        raise SampleError(f"{len(x)} samples of {samples.inputs} inputs are too few: about {2 * samples.inputs} are needed")
    if bool((y < 0).any()):
        raise SampleError("y has negative values, so it is not the output of a ReLU layer")
    active = (y > 0).sum(axis=0)
    short = (active > 0) & (active < samples.inputs)
    if bool(short.any()):
        column = int(jnp.argmax(short))
        raise SampleError(
            f"column {column} of y is positive in only {int(active[column])} samples; {samples.inputs} are needed, which takes "
            f"about {2 * samples.inputs} samples"
        )
    w, determined = _least_squares(x, y)
    if not bool((determined | (active == 0)).all()):
        column = int(jnp.argmin(determined | (active == 0)))
        raise SampleError(f"the samples where column {column} of y is positive do not span all {samples.inputs} inputs")
    return w


def _enough(samples: Samples) -> tuple[jax.Array, jax.Array]:
    """The first samples, enough for all columns to be active often enough, or all samples."""
    wanted = 4 * _AMPLE * samples.inputs
    while True:
        head = samples.head(wanted)
        parts = [(x[:rows], y[:rows]) for x, y, rows in head.read()]
        x, y = (jnp.concatenate(part) for part in zip(*parts, strict=True))
        if len(x) < wanted or bool(((y > 0).sum(axis=0) >= _AMPLE * samples.inputs).all()):
            return x, y
        wanted *= 4


@jax.jit
@highest_precision
def _least_squares(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W, and whether each column is determined; by QR, which keeps the digits that a Gram matrix would lose."""

    def column(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, r = jnp.linalg.qr(x * (y > 0)[:, None])
        scale = jnp.abs(jnp.diagonal(r))
        determined = scale.min() > jnp.sqrt(jnp.finfo(x.dtype).eps) * scale.max()
        w = solve_triangular(r, q.T @ y)
        return jnp.where(determined, w, 0), determined

    w, determined = jax.lax.map(column, y.T)
    return w.T, determined
