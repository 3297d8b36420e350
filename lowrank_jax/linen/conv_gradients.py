"""Convolutions whose gradients are matrix products on CPU.

On CPU, XLA computes a kernel's gradient as a convolution over the batch.  It first transposes the input and the output's
gradient, and recomputes the input where a normalisation or an activation made it.  With few filters, as in the first stage of
a factored kernel, it is faster to copy the output's gradient once for every place of the window, side by side, and to multiply
that with the input and with the kernel.

Only the derivative differs: the convolution itself is XLA's, and so is everything on other devices.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding
from jax.custom_derivatives import SymbolicZero

Place = tuple[int, ...]  # one number for every axis of the window

_WIDEST = 5  # times the input's channels; with more, writing that array takes as long as XLA's gradient


def convolve(conv: nn.Conv, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """What `conv` computes from x `[batch, *space, c]` with a kernel `[*window, c, filters]`, without its bias."""
    conv = conv.clone(use_bias=False, name=None)
    x, kernel, _ = promoted(conv, x, kernel, None)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv.apply({"params": {"kernel": kernel}}, x)  # type: ignore[return-value]

    if not _has_products(conv, kernel, x):
        return plain(x, kernel)

    def products(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _products(conv, kernel, x)

    def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, kernel, cpu=products, default=plain)

    @jax.custom_jvp
    def convolved(x, kernel):
        return plain(x, kernel)

    def tangent(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        terms = [(dx, kernel)] if not isinstance(dx, SymbolicZero) else []
        terms += [(x, dkernel)] if not isinstance(dkernel, SymbolicZero) else []
        return convolved(x, kernel), functools.reduce(jnp.add, (linear(*term) for term in terms))

    convolved.defjvp(tangent, symbolic_zeros=True)
    return convolved(x, kernel)


def promoted(conv: nn.Conv, x: jax.Array, kernel: jax.Array, bias: Any) -> tuple[jax.Array, jax.Array, Any]:
    """What the layer is given, in the dtype that it computes in."""
    return conv.promote_dtype(x, kernel, bias, dtype=conv.dtype)  # type: ignore[return-value]


def per_axis(setting: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    """A layer's strides or dilations, one for every axis of its window."""
    return (setting or 1,) * axes if setting is None or isinstance(setting, int) else tuple(setting)


def is_known(space: Sequence[Any]) -> bool:
    """Whether these sizes are numbers; those of an exported program may be symbols."""
    return all(isinstance(size, int) for size in space)


def _has_products(conv: nn.Conv, kernel: jax.Array, x: jax.Array) -> bool:
    *window, channels, filters = kernel.shape
    axes = len(window)
    return (
        x.ndim == axes + 2
        and is_known(x.shape[1:-1])
        and conv.mask is None
        and conv.feature_group_count == 1
        and per_axis(conv.input_dilation, axes) == (1,) * axes
        and (not isinstance(conv.padding, str) or conv.padding in ("SAME", "VALID"))
        and math.prod(window) * filters <= _WIDEST * channels
    )


def _products(conv: nn.Conv, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """The convolution as products with every place of the window, shifted into position and summed.

    Only its transpose is used: there the output's gradient is shifted, then multiplied.
    """
    *window, channels, filters = kernel.shape
    size, pads, strides, dilation = _geometry(conv, window, x.shape[1:-1])
    total = jnp.zeros((x.shape[0], *size, filters), x.dtype)
    for phase, places in _phases(window, pads, strides, dilation).items():
        part = x[(slice(None), *(slice(start, None, stride) for start, stride in zip(phase, strides, strict=True)))]
        if 0 in part.shape[1:]:  # padding alone
            continue
        flat = jnp.stack([kernel[place] for place in places], axis=1).reshape(channels, -1)
        product = jnp.dot(part.reshape(-1, channels), flat, precision=conv.precision).reshape(*part.shape[:-1], -1)
        images = jax.lax.split(product, [filters] * len(places), axis=product.ndim - 1)
        for image, shifts in zip(images, places.values(), strict=True):
            ends = [new - old + shift for new, old, shift in zip(size, part.shape[1:-1], shifts, strict=True)]
            edges = [(-shift, end, 0) for shift, end in zip(shifts, ends, strict=True)]
            total += jax.lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return total


def _geometry(conv: nn.Conv, window: Sequence[int], space: Sequence[int]) -> tuple[Place, list[tuple[int, int]], Place, Place]:
    """The output's size, the padding, strides and dilations, for every axis."""
    strides, dilation = per_axis(conv.strides, len(window)), per_axis(conv.kernel_dilation, len(window))
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    padding = canonicalize_padding(conv.padding, len(window))
    pads = list(jax.lax.padtype_to_pads(space, reach, strides, padding) if isinstance(padding, str) else padding)
    covered = [n + lo + hi - r for n, (lo, hi), r in zip(space, pads, reach, strict=True)]
    return tuple(max(0, c // s + 1) for c, s in zip(covered, strides, strict=True)), pads, strides, dilation


def _phases(
    window: Sequence[int], pads: Sequence[tuple[int, int]], strides: Place, dilation: Place
) -> dict[Place, dict[Place, Place]]:
    """With strides s, every place of the window reads every s-th position.

    Returns:
      By phase (the first position modulo s), then by place: how far the place's reads are shifted, in steps of s.
    """
    found: dict[Place, dict[Place, Place]] = {}
    for place in itertools.product(*map(range, window)):
        offsets = [i * d - lo for i, d, (lo, _) in zip(place, dilation, pads, strict=True)]
        shifts, phase = zip(*map(divmod, offsets, strides), strict=True)
        found.setdefault(phase, {})[place] = shifts
    return found
