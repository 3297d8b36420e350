"""Methods that turn dense kernels into factor pairs: one table, from name to function."""

import functools
from collections.abc import Callable, Sequence

import jax

from lowrank_jax.projection import ablations, activations, batched, linalg, matrix, sampled
from lowrank_jax.projection.activations import ActivationLike
from lowrank_jax.projection.linalg import Pair
from lowrank_jax.projection.stack import Stack
from lowrank_jax.text import did_you_mean

# From all kernels of a method, in stacks of equal shape, to u [k, n, rank] and v [k, rank, m] for every stack.
Method = Callable[[Sequence[Stack]], list[Pair]]


def _one_by_one(factor: Callable[[Stack, jax.Array, jax.Array], Pair]) -> Method:
    """A method from a function `(stack, key, w)` of a single matrix; mapped, so that each shape is compiled once."""
    return lambda stacks: [
        jax.lax.map(lambda pair, stack=stack: factor(stack, *pair), (stack.keys, stack.w)) for stack in stacks
    ]


def _projection(subspace: str, normalized: bool = False) -> Method:
    return _one_by_one(
        lambda stack, key, w: matrix.kernel_projection(
            w, stack.rank, activation=stack.activation, subspace=subspace, normalized=normalized, group=stack.group
        )
    )


SAMPLED = "function_approximation"  # the method that accepts samples of the layers' inputs
TWO_SIDED = "two_sided"  # the method that needs moments of the layers' inputs and of the gradients at their outputs

METHODS: dict[str, Method] = {
    "kernel_projection": batched.project,
    "kernel_projection_search": _projection("search"),
    "kernel_projection_refine": _projection("refine"),
    SAMPLED: sampled.approximate,
    "spectral": matrix.spectral_stacks,
    TWO_SIDED: matrix.spectral_stacks,  # of what `two_sided_stacks` makes of the kernels; alone it knows nothing
    "norm_preserving": functools.partial(batched.project, normalized=True),
    "norm_preserving_refine": _projection("refine", normalized=True),
    "spectral_global_scale": _one_by_one(
        lambda stack, key, w: ablations.spectral_global_scale(w, stack.rank, activation=stack.activation, group=stack.group)
    ),
    "spectral_column_scales": _one_by_one(
        lambda stack, key, w: ablations.spectral_column_scales(w, stack.rank, activation=stack.activation, group=stack.group)
    ),
    "random_subspace": _one_by_one(
        lambda stack, key, w: ablations.random_subspace(key, w, stack.rank, activation=stack.activation, group=stack.group)
    ),
    "unit_spectral": _one_by_one(lambda stack, key, w: ablations.unit_spectral(w, stack.rank)),
    "random": _one_by_one(lambda stack, key, w: ablations.random_factors(key, w, stack.rank)),
}


def factor(
    method: str, key: jax.Array, w: jax.Array, rank: int, *, activation: ActivationLike = "relu", group: int = 1
) -> Pair:
    """Factors a single matrix `[n, m]` by a method of the table: u `[n, rank]` and v `[rank, m]`.

    Raises:
      ValueError: unknown method or activation, w is not a matrix of real, finite numbers, or rank or group does not fit it;
        `two_sided`, which needs more than the matrix (`projection.two_sided`).
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{did_you_mean(method, METHODS)}")
    if method == TWO_SIDED:
        raise ValueError(f"the method {TWO_SIDED!r} needs moments of inputs and gradients besides: projection.two_sided")
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    linalg.check_group(w, group)
    activations.get(activation)
    return _factor(method, key, w, rank, activation, group)


@functools.partial(jax.jit, static_argnames=("method", "rank", "activation", "group"))
def _factor(method: str, key: jax.Array, w: jax.Array, rank: int, activation: ActivationLike, group: int) -> Pair:
    [(u, v)] = METHODS[method]([Stack(key[None], w[None], rank, activation, group)])
    return u[0], v[0]
