"""Convolutions whose gradients are products on CPU."""

import functools

import flax.linen as nn
import hypothesis
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.kernel import channel_view, spatial_view
from lowrank_jax.linen import conv_gradients

numbers = st.integers(1, 3)


def plain(conv, kernel, x) -> jax.Array:
    return conv.apply({"params": {"kernel": kernel}}, x)  # type: ignore[return-value]


def example(conv, space, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(*conv.kernel_size, channels, conv.features), (2, *space, channels)]
    primals, tangents = ([rng.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(2))
    return primals, tangents


@st.composite
def cases(draw):
    """A convolution of one or two axes with few filters, and the size of an image, which may be smaller than its window."""
    axes = draw(st.integers(1, 2))
    window, strides, dilation = (tuple(draw(numbers) for _ in range(axes)) for _ in range(3))
    explicit = st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * axes)
    padding = draw(st.one_of(st.sampled_from(("SAME", "VALID")), st.integers(0, 2), explicit))
    conv = nn.Conv(1, window, strides, padding, kernel_dilation=dilation, use_bias=False)
    space = tuple(draw(st.integers(1, (k - 1) * d + 3)) for k, d in zip(window, dilation, strict=True))
    return conv, space


def reference(conv, primals, tangents):
    """Output, tangent and cotangents of the output's cosine, summed over the places of the window."""
    (kernel, x), (dkernel, dx) = ([part.astype(np.float64) for part in parts] for parts in (primals, tangents))
    window, strides, dilation = conv.kernel_size, conv.strides, conv.kernel_dilation
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    pads = [(0, 0), *padding_of(conv.padding, x.shape[1:-1], reach, strides), (0, 0)]
    x, dx = np.pad(x, pads), np.pad(dx, pads)
    size = [max(0, (n - r) // s + 1) for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    y, dy = (np.zeros((len(x), *size, conv.features)) for _ in range(2))
    places = {}
    for place in np.ndindex(*window):
        starts = [np.arange(n) * s + i * d for n, s, i, d in zip(size, strides, place, dilation, strict=True)]
        places[place] = (slice(None), *np.ix_(*starts))
        y += x[places[place]] @ kernel[place]
        dy += dx[places[place]] @ kernel[place] + x[places[place]] @ dkernel[place]
    x_bar, kernel_bar = np.zeros_like(x), np.zeros_like(kernel)
    for place, read in places.items():
        x_bar[read] += np.cos(y) @ kernel[place].T
        kernel_bar[place] = np.tensordot(x[read], np.cos(y), (range(x.ndim - 1),) * 2)
    inner = tuple(slice(low, n - high) for n, (low, high) in zip(x.shape, pads, strict=True))
    return y, dy, kernel_bar, x_bar[inner]


def padding_of(padding, space, reach, strides):
    """Before and after every axis."""
    if padding == "VALID":
        return [(0, 0)] * len(space)
    if padding == "SAME":  # as many outputs as strides fit; what is uneven goes behind
        totals = [max(0, (-(-n // s) - 1) * s + r - n) for n, r, s in zip(space, reach, strides, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(padding, padding)] * len(space) if isinstance(padding, int) else padding


@given(cases())
@hypothesis.example((nn.Conv(1, (3, 3), (1, 1), "VALID", kernel_dilation=(1, 1), use_bias=False), (1, 4)))  # no output at all
def test_values_and_derivatives_are_those_of_the_convolution(case):
    conv, space = case
    primals, tangents = example(conv, space, channels=3)

    @jax.jit  # one program, rather than one for every operation
    def derivatives(primals, tangents):
        convolve = functools.partial(conv_gradients.convolve, conv)
        y, dy = jax.jvp(convolve, primals, tangents)
        return y, dy, *jax.vjp(convolve, *primals)[1](jnp.cos(y))

    for found, expected in zip(derivatives(primals, tangents), reference(conv, primals, tangents), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_higher_derivatives_and_batches_of_kernels():
    conv = nn.Conv(2, (3, 3), 2, use_bias=False)
    (kernel, x), (dkernel, _) = example(conv, (5, 4), channels=6)

    def curvature(convolve):
        def loss(kernel):
            return jnp.sum(jnp.tanh(convolve(conv, kernel, x)))

        return jax.jvp(jax.grad(loss), (kernel,), (dkernel,))[1]

    def gradient(convolve, w):
        return jax.grad(lambda w: jnp.sum(convolve(conv, w, x) ** 2))(w)

    @jax.jit
    def both(kernels):
        batch = jax.vmap(functools.partial(gradient, conv_gradients.convolve))(kernels)
        alone = [gradient(plain, w) for w in kernels]
        return curvature(conv_gradients.convolve), curvature(plain), batch, alone

    found, expected, batch, alone = both(np.stack([kernel, dkernel]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(batch, np.stack(alone), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("filters", "platform", "convolutions", "products"),
    [
        (16, "cpu", 1, 2),  # forward, as products cannot be
        (64, "cpu", 3, 0),  # writing 9 x 64 channels for 64 would take too long
        (16, "tpu", 3, 0),
        (16, "cuda", 3, 0),
    ],
)
def test_gradients_are_products_on_cpu_where_filters_are_few(filters, platform, convolutions, products):
    conv = nn.Conv(filters, (3, 3), use_bias=False)
    primals, _ = example(conv, (8, 8), channels=64)
    loss = jax.value_and_grad(lambda *args: jnp.sum(conv_gradients.convolve(conv, *args) ** 2), (0, 1))
    text = jax.jit(loss).trace(*primals).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("stablehlo.dot_general") == products


@pytest.mark.parametrize(
    "settings",
    [{"padding": "CIRCULAR"}, {"padding": "REFLECT"}, {"input_dilation": 2, "padding": 1}],
)
def test_what_has_no_products_is_left_to_the_layer(settings):
    conv = nn.Conv(1, (3, 3), use_bias=False, **settings)
    (kernel, x), _ = example(conv, (5, 4), channels=9)
    run = functools.partial(conv_gradients.convolve, conv)
    assert "custom_jvp" not in str(jax.make_jaxpr(run)(kernel, x))
    np.testing.assert_array_equal(jax.jit(run)(kernel, x), jax.jit(functools.partial(plain, conv))(kernel, x))


def test_the_dtype_is_the_layers():
    conv = nn.Conv(1, (3, 3), dtype=jnp.bfloat16, use_bias=False)
    (kernel, x), _ = example(conv, (5, 4), channels=9)
    y, pull = jax.eval_shape(functools.partial(jax.vjp, functools.partial(conv_gradients.convolve, conv)), kernel, x)
    assert y.dtype == jnp.bfloat16
    assert [gradient.dtype for gradient in jax.eval_shape(pull, y)] == [jnp.float32, jnp.float32]


@pytest.mark.parametrize(
    ("sizes", "strides", "padding"),
    [("b, 8, 8, 3", 2, "SAME"), ("b, h, w, 3", 1, "VALID")],  # jax itself has no gradient for open sizes and strides
)
@pytest.mark.parametrize("scheme", [channel_view, spatial_view])
def test_an_exported_gradient_takes_batches_of_any_size(scheme, sizes, strides, padding):
    conv, view = nn.Conv(6, (3, 3), strides, padding), scheme((3, 3, 3, 6))
    rng = np.random.default_rng(0)
    u, v, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((view.n, 1), (1, view.m), (6,)))
    params = {"kernel": view.from_factors(u, v), "bias": bias}

    def gradient(params, x):
        return jax.grad(lambda p: jnp.sum(jnp.tanh(lr.apply(conv, {"params": p}, x))))(params)

    def plain_gradient(params, x):  # of the factors, through the layer as it is
        return jax.grad(lambda p: jnp.sum(jnp.tanh(conv.apply({"params": lr.merge(p)}, x))))(params)

    constraints = ["h >= 3", "w >= 3"] if "h" in sizes else []
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes, constraints=constraints), np.float32)
    exported = jax.export.export(jax.jit(gradient), platforms=("cpu", "tpu"))(params, x)
    program = jax.export.deserialize(exported.serialize())
    for batch in (1, 3):
        images = rng.standard_normal((batch, 8, 8, 3)).astype(np.float32)
        found, expected = program.call(params, images), jax.jit(plain_gradient)(params, images)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
