"""Function approximation by sampling: minimises the function risk on random inputs, without a closed form.

The reference that the kernel projection has to match in a small fraction of the time (docs/mathematics.md, section 7).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.projection import activations, linalg, matrix
from lowrank_jax.projection.activations import ActivationLike
from lowrank_jax.projection.batched import measure
from lowrank_jax.projection.linalg import Pair
from lowrank_jax.projection.stack import Stack

STEPS, BATCH_SIZE, LEARNING_RATE = 1000, 256, 0.01


def function_approximation(
    key: jax.Array,
    w: jax.Array,
    rank: int,
    *,
    activation: ActivationLike = "relu",
    group: int = 1,
    inputs: jax.Array | None = None,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
) -> Pair:
    """Minimises the sampled function risk over both factors with Adam, starting from the spectral ones.

    Args:
      key: for the inputs drawn at every step.
      w: `[n, m]`.
      rank: from 1 to min(n, m).
      activation: what follows the kernel: a name in `activations.ACTIVATIONS`, or any elementwise JAX function.
      group: columns per output; each of them has inputs of its own.
      inputs: samples of the layer's inputs, `[samples, group, n]`; by default x ~ N(0, I), drawn anew at every step.
      steps, batch_size: number of steps, and of inputs per step.

    Returns:
      u `[n, rank]` and v `[rank, m]` in the dtype of w, balanced: UᵀU = VVᵀ.

    Raises:
      ValueError: w is not a matrix of real, finite numbers, the rank is out of range, the activation is unknown, group does
        not divide m, the inputs have another shape or are not finite, or steps or batch_size is below 1.
    """
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    linalg.check_group(w, group)
    if inputs is not None and (inputs.ndim != 3 or inputs.shape[1:] != (group, w.shape[0])):
        raise ValueError(f"inputs must be [samples, {group}, {w.shape[0]}], got {list(inputs.shape)}")
    if inputs is not None and (not len(inputs) or not linalg.known_finite(inputs)):
        raise ValueError("inputs are empty or contain non-finite values")
    activations.get(activation)
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps ({steps}) and batch_size ({batch_size}) must be at least 1")
    return _one(key, w, rank, activation, group, inputs, steps, batch_size)


@functools.partial(jax.jit, static_argnames=("rank", "activation", "group", "steps", "batch_size"))
def _one(
    key: jax.Array,
    w: jax.Array,
    rank: int,
    activation: ActivationLike,
    group: int,
    inputs: jax.Array | None,
    steps: int,
    batch_size: int,
) -> Pair:
    stack = Stack(key[None], w[None], rank, activation, group, None if inputs is None else inputs[None])
    ((u, v),) = approximate([stack], steps=steps, batch_size=batch_size)
    return u[0], v[0]


@linalg.highest_precision
def approximate(stacks: Sequence[Stack], *, steps: int = STEPS, batch_size: int = BATCH_SIZE) -> list[Pair]:
    """`function_approximation` of many kernels at once, in one scan over the steps.

    Returns:
      For every stack u `[k, n, rank]` and v `[k, rank, m]`.
    """
    units = [linalg.units(stack.w) for stack in stacks]
    own = [unit / measure(activations.get(stack.activation), unit) for stack, unit in zip(stacks, units, strict=True)]
    kernels = [stack.w.astype(unit.dtype) / unit for stack, unit in zip(stacks, own, strict=True)]
    spectral = matrix.spectral_stacks([dataclasses.replace(stack, w=w) for stack, w in zip(stacks, kernels, strict=True)])
    # Each factor is measured in its own size, so that a step of Adam is the same fraction of every factor.
    sizes = jax.tree.map(lambda factor: jnp.sqrt(jnp.mean(factor**2, axis=(1, 2), keepdims=True)), spectral)
    start = jax.tree.map(lambda factor, size: factor / jnp.where(size > 0, size, 1), spectral, sizes)
    adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def factors(params: Any) -> list[Pair]:
        return jax.tree.map(jnp.multiply, params, sizes)

    def loss(params: Any, step: jax.Array) -> jax.Array:
        # Every kernel's loss depends on its own factors alone, so the gradient of the sum holds all gradients.
        parts = [
            jnp.sum(_relative_loss(stack, w, pair, step, batch_size))
            for stack, w, pair in zip(stacks, kernels, factors(params), strict=True)
        ]
        return sum(parts, start=jnp.zeros(()))

    def advance(carry: Any, step: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params, step), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(advance, (start, adam.init(start)), jnp.arange(steps))
    us, vs = zip(*factors(params), strict=True)
    balanced = linalg.rebalance(us, vs)
    roots = map(jnp.sqrt, own)
    return [
        ((root * u).astype(stack.w.dtype), (root * v).astype(stack.w.dtype))
        for stack, root, (u, v) in zip(stacks, roots, balanced, strict=True)
    ]


def _relative_loss(stack: Stack, w: jax.Array, pair: Pair, step: jax.Array, batch_size: int) -> jax.Array:
    """|sigma(xW) - sigma(xUV)|² over |sigma(xW) - sigma(0)|² on a batch of inputs, `[k]`."""
    fn = activations.get(stack.activation).fn

    def one(key: jax.Array, w: jax.Array, u: jax.Array, v: jax.Array, inputs: jax.Array | None) -> jax.Array:
        n, m = w.shape
        key = jax.random.fold_in(key, step)
        if inputs is None:
            x = jax.random.normal(key, (batch_size, stack.group, n), w.dtype)
        else:
            x = inputs[jax.random.randint(key, (batch_size,), 0, len(inputs))].astype(w.dtype)
        outputs = m // stack.group

        def layer(x: jax.Array, kernel: jax.Array) -> jax.Array:
            """`[batch, group, k] -> [batch, outputs]`."""
            return fn(jnp.einsum("bgk,kgo->bo", x, kernel.reshape(-1, stack.group, outputs)))

        wanted, got = layer(x, w), layer(x @ u, v)
        return linalg.ratio(jnp.sum((wanted - got) ** 2), jnp.sum((wanted - fn(jnp.zeros((), w.dtype))) ** 2))

    assert stack.keys is not None
    return jax.vmap(one)(stack.keys, w, *pair, stack.inputs)
