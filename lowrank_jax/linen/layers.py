"""Layers on factored kernels, inside any Linen model or as modules of their own.

The factor pair says how its layer runs (`LowRankKernel.execution`): as two thin linear operations in place of one, or as the
dense layer on the factors' product.

Both stages are Flax layers themselves, so padding, dilation, precision and dtype promotion mean exactly what they mean there.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import in_filter

from lowrank_jax.kernel import (
    SPATIAL_ROWS,
    Execution,
    LowRankKernel,
    MatrixView,
    channel_view,
    dense_view,
    is_low_rank,
    spatial_view,
)
from lowrank_jax.linen import boxes, conv_gradients
from lowrank_jax.linen.conv_gradients import per_axis
from lowrank_jax.linen.interception import Interceptor, foreign_inside, intercept, intercepts, unseen
from lowrank_jax.linen.known import (
    BUILT_IN,
    KnownLayer,
    Rows,
    find,
    first_argument,
    has_own_run,
    kernel_of,
    rows_of,
    summed_axes,
    with_first_argument,
)
from lowrank_jax.linen.model_check import check_model
from lowrank_jax.projection import methods
from lowrank_jax.projection.activations import ActivationLike

Initializer = Callable[..., jax.Array]


def apply(model: nn.Module, variables: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`model.apply`, where any kernel in `variables["params"]` may be a `LowRankKernel`.

    Takes and returns what `model.apply` does (`rngs=`, `mutable=`, `method=`, ...).  A layer whose kernel is factored
    computes `(x @ u) @ v`, or `x @ (u @ v)` if its execution is `merged`; every other layer runs as its author wrote it, and
    gets the product of factors that are `premerged`.

    Raises:
      TypeError: the model is not a Linen module.
      ValueError: a pair is not of the matrix that its layer multiplies with, parameters with premerged kernels are mutable, or
        another interceptor was entered within `factored`.
    """
    check_model(model)
    with factored():
        return call_model(model, _multiplied(variables, kwargs.get("mutable", False)), *args, **kwargs)


_OPTIONS = ("rngs", "mutable", "capture_intermediates")  # of `model.apply`


def call_model(model: nn.Module, given: Any, /, *args: Any, method: Any = None, **kwargs: Any) -> Any:
    """`model.apply(given, ...)`, also for a model that has an argument called "variables" itself."""
    if "variables" not in kwargs:
        return model.apply(given, *args, method=method, **kwargs)
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    return model.apply(given, *args, method=with_keywords(method, kwargs), **options)


def with_keywords(method: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """A method of a model with these keyword arguments, whatever they are called."""

    def call(module: nn.Module, *args: Any) -> Any:
        if isinstance(method, str):
            return getattr(module, method)(*args, **kwargs)
        unbound = type(module).__call__ if method is None else getattr(method, "__func__", method)
        return unbound(module, *args, **kwargs)

    return call


@contextlib.contextmanager
def factored() -> Iterator[None]:
    """Within it, whatever calls a Linen module runs it on factors: `model.apply`, a bound module, a wrapper's `__call__`.

        with lr.factored():
            logits = hugging_face_model(tokens, params=params).logits

    A function under `jax.jit` must be traced within it: put the `with` inside the function.  It holds for the thread that
    enters it.  Modules that are bound to premerged kernels have their products from the first call on.
    """
    with contextlib.nullcontext() if intercepts(_ON_FACTORS) else intercept(_ON_FACTORS):
        yield


def _multiplied(variables: Any, mutable: Any) -> Any:
    """With the product in the place of parameters' factors that are premerged.

    Raises:
      ValueError: there are some, and the parameters are mutable: what the model returned would be products.
    """
    if not isinstance(variables, Mapping):
        return variables  # flax says what they must be
    params = variables.get("params", {})
    leaves, structure = jax.tree.flatten(params, is_leaf=is_low_rank)
    if not any(map(_is_premerged, leaves)):
        return variables
    if in_filter(mutable, "params"):
        raise ValueError("parameters with premerged kernels cannot be mutable: the model gets and returns their products")
    products = [boxes.merged(leaf) if _is_premerged(leaf) else leaf for leaf in leaves]
    return {**variables, "params": jax.tree.unflatten(structure, products)}


def _is_premerged(leaf: Any) -> bool:
    return is_low_rank(leaf) and leaf.execution == "premerged"


def _multiply_in_scope(module: nn.Module) -> None:
    """The same for the parameters that a module was bound to, before it first reads any.

    A scope lets nobody replace what is immutable, so its own dict is changed: flax makes one for every `apply` and `bind`.
    """
    scope = module.scope
    if scope is None or scope.parent is not None:
        return
    with jax.ensure_compile_time_eval():  # a bound module outlives a jitted function that is the first to call it
        multiplied = _multiplied(scope._variables, scope.mutable)
    if multiplied is not scope._variables:
        scope._variables["params"] = multiplied["params"]  # type: ignore[index]


def on_factors(arrived: Callable[[LowRankKernel], LowRankKernel] = lambda pair: pair) -> Interceptor:
    """The interceptor under which known layers run on their factor pairs, each of which passes `arrived` first."""

    def run(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        _multiply_in_scope(layer)
        known = find(layer) if context.method_name == "__call__" else None
        pairs = _pairs(layer, known) if known else {}
        if known is None or not pairs:
            return next_fun(*args, **kwargs)
        if foreign_inside():
            raise ValueError("an interceptor within lr.factored() sees no layers on factors: put it around lr.factored()")
        for name, pair in pairs.items():
            _check_rows(layer, name, pair)
        with unseen():
            return _run(layer, known, {name: arrived(pair) for name, pair in pairs.items()}, args, kwargs)

    return run


_ON_FACTORS = on_factors()


def _pairs(layer: nn.Module, known: KnownLayer) -> dict[str, LowRankKernel]:
    """Those kernels of a layer that are factor pairs, by their names below it."""
    kernels = {name: kernel_of(layer, name) for name in known.kernels}
    return {name: kernel for name, kernel in kernels.items() if isinstance(kernel, LowRankKernel)}


def _check_rows(layer: nn.Module, name: str, pair: LowRankKernel) -> None:
    """Refuses factors of another matrix than the one that the layer multiplies with.

    Raises:
      ValueError: they are.
    """
    rows = rows_of(layer)
    fitting = [SPATIAL_ROWS, tuple(range(pair.ndim - 1))] if rows is None else [rows]
    if pair.rows not in fitting and not has_own_run(layer):
        place = "/".join((*layer.path, name))
        raise ValueError(f"{place}: has factors with rows {pair.rows}, and a {type(layer).__name__} runs on rows {fitting[-1]}")


def _run(layer: Any, known: KnownLayer, pairs: dict[str, LowRankKernel], args: Any, kwargs: Any) -> Any:
    params = with_kernels(layer, pairs)
    if known.run is not None:
        return known.run(layer, params, *args, **kwargs)
    ((name, pair),) = pairs.items()
    if known.base in BUILT_IN:
        return run_layer(layer, pair, params.get("bias"), first_argument(layer, args, kwargs))
    return own_stages(layer, name, pair, args, kwargs)


def on_kernels(layer: Any, kernels: dict[str, jax.Array], args: Any, kwargs: Any, **changes: Any) -> Any:
    """What a layer computes with other kernels, given by their names below it, and with changed settings."""
    params = with_kernels(layer, kernels)
    return alone(layer, **changes).apply({**layer.variables, "params": params}, *args, **kwargs)


def alone(layer: Any, **changes: Any) -> Any:
    """The same layer outside of its model, with changed settings."""
    return layer.clone(name=None, parent=None, **changes)


def with_kernels(layer: Any, kernels: Mapping[str, Any]) -> Any:
    """A layer's parameters, without boxes, with other kernels, given by their names below it."""
    params = nn.meta.unbox(layer.variables["params"])
    for name, kernel in kernels.items():
        params = _with_leaf(params, name.split("/"), kernel)
    return params


def _with_leaf(params: Any, path: Sequence[str], leaf: Any) -> Any:
    first, *rest = path
    return {**params, first: _with_leaf(params[first], rest, leaf) if rest else leaf}


def own_stages(layer: Any, name: str, pair: LowRankKernel, args: Any, kwargs: Any) -> Any:
    """A registered layer: x U, and the layer itself with V for its kernel, the rank's axis in the place of the rows'."""
    x = first_argument(layer, args, kwargs)
    dtype = getattr(layer, "dtype", None) or jnp.result_type(x, pair.dtype)
    if pair.execution == "merged":
        return on_kernels(layer, {name: pair.product(dtype, getattr(layer, "precision", None))}, args, kwargs)
    n, r = pair.view.n, pair.rank
    flat = x.reshape(*x.shape[: x.ndim - summed_axes(x.shape, n)], n)
    hidden = jnp.matmul(flat.astype(dtype), pair.u.reshape(n, r).astype(dtype), precision=getattr(layer, "precision", None))
    return second_stage(layer, name, pair.rows, pair.v, hidden, args, kwargs)


def second_stage(layer: Any, name: str, rows: Rows, v: jax.Array, hidden: jax.Array, args: Any, kwargs: Any) -> Any:
    """A registered layer on x U `[..., r]` in the place of its first argument, with V `[r, *columns]` for its kernel."""
    axis = getattr(layer, "axis", None)
    changes = {} if axis is None else {"axis": -1 if isinstance(axis, int) else (-1,)}
    args, kwargs = with_first_argument(layer, args, kwargs, hidden)
    return on_kernels(layer, {name: jnp.moveaxis(v, 0, rows[0])}, args, kwargs, **changes)


def run_layer(module: Any, kernel: LowRankKernel, bias: Any, x: jax.Array) -> jax.Array:
    """What an `nn.Dense`, `nn.DenseGeneral` or `nn.Conv` computes from `x`, its kernel given as a factor pair.

    Args:
      module: the layer, for its settings; its own parameters are not read.
      kernel: the factor pair, without stack axes.
      bias: the layer's bias, or None if it has none.
      x: its input.
    """
    if kernel.execution == "merged":
        return _merged(module, kernel, bias, x)
    if not isinstance(module, nn.Conv):
        return _dense_stages(module, kernel, bias, x)
    stages = _spatial_stages if kernel.rows == SPATIAL_ROWS else _channel_stages
    return stages(module, kernel, bias, x)


def _merged(module: Any, kernel: LowRankKernel, bias: Any, x: jax.Array) -> jax.Array:
    """The dense layer on the product, in the dtype that it computes in."""
    dtype = jnp.result_type(x, kernel.dtype) if module.dtype is None else module.dtype
    product = kernel.product(dtype, module.precision)
    if not isinstance(module, nn.Conv):
        return _on(module.clone(name=None), product, x, bias)
    x, product, bias = conv_gradients.promoted(module, x, product, bias)
    y = conv_gradients.convolve(module, product, x)
    return y if bias is None else y + bias


def _on(layer: Any, kernel: jax.Array, x: jax.Array, bias: Any = None) -> Any:
    zeros = nn.initializers.zeros  # the layer's own initialisers may say how a kernel of the whole size is partitioned
    return layer.clone(kernel_init=zeros, bias_init=zeros).apply(
        {"params": {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}}, x
    )


def _dense_stages(module: Any, kernel: LowRankKernel, bias: Any, x: jax.Array) -> jax.Array:
    first = module.clone(features=kernel.rank, use_bias=False, name=None)
    second = module.clone(name=None)
    if isinstance(second, nn.DenseGeneral):
        second = second.clone(axis=-1)
    return _on(second, kernel.v, _on(first, kernel.u, x), bias)


def _channel_stages(module: nn.Conv, kernel: LowRankKernel, bias: Any, x: jax.Array) -> jax.Array:
    """The window with r filters, then 1x1; a 1x1 stage is a product of matrices.

    On CPU the weight gradient of such a product takes a fraction of a convolution's time.
    """
    product = nn.Dense(
        module.features,
        use_bias=module.use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        precision=module.precision,
        parent=None,
    )
    narrow = {"features": kernel.rank, "use_bias": False}
    if _is_pointwise(module):
        hidden = _on(product.clone(**narrow), kernel.u.reshape(-1, kernel.rank), x)
        return _on(product, kernel.v, hidden, bias)
    hidden = conv_gradients.convolve(module.clone(**narrow, name=None), kernel.u, x)
    if not conv_gradients.is_known(hidden.shape[1:]):
        return _on(product, kernel.v, hidden, bias)
    # With all positions on one axis, CPUs need no copy for the weight gradient.  On TPUs this costs nothing here, after a
    # window; between two products it would change the layout of every activation.
    return _on(product, kernel.v, hidden.reshape(-1, kernel.rank), bias).reshape(*hidden.shape[:-1], module.features)


def _is_pointwise(module: nn.Conv) -> bool:
    """Whether the convolution is a product of matrices."""
    size = _window(module)
    unit = (None, 1)
    return (
        all(k == 1 for k in size)
        and isinstance(module.padding, str)
        and all(s in unit for s in per_axis(module.strides, len(size)))
        and all(s in unit for s in per_axis(module.input_dilation, len(size)))
    )


def _window(module: Any) -> tuple[int, ...]:
    return (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)


def _spatial_stages(module: nn.Conv, kernel: LowRankKernel, bias: Any, x: jax.Array) -> jax.Array:
    """kh x 1 with r filters, then 1 x kw: strides, dilations and padding go to the stage that has their axis."""
    kh, kw = kernel.u.shape[0], kernel.v.shape[1]
    strides = per_axis(module.strides, 2)
    dilation = per_axis(module.kernel_dilation, 2)
    input_dilation = per_axis(module.input_dilation, 2)
    padding = _padding_per_axis(module.padding)

    def stage(axis: int, size: tuple[int, int], **changes: Any) -> nn.Conv:
        return module.clone(
            kernel_size=size,
            strides=_only(axis, strides),
            kernel_dilation=_only(axis, dilation),
            input_dilation=_only(axis, input_dilation),
            padding=padding[axis],
            name=None,
            **changes,
        )

    hidden = conv_gradients.convolve(stage(0, (kh, 1), features=kernel.rank), kernel.u[:, None], x)
    return _on(stage(1, (1, kw)), kernel.v.swapaxes(0, 1)[None], hidden, bias)


def _only(axis: int, setting: tuple[int, ...]) -> tuple[int, int]:
    return (setting[0], 1) if axis == 0 else (1, setting[1])


def _padding_per_axis(padding: Any) -> tuple[Any, Any]:
    """Padding for the two stages.  Named paddings pad nothing along an axis of window size one."""
    if isinstance(padding, str):
        return padding, padding
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return (rows, 0), (0, columns)


def _factored_kernel(key: jax.Array, dense_init: Initializer, view: MatrixView, layer: Any) -> LowRankKernel:
    """Draws the dense kernel as the plain layer does, in a box or without one, then factors it."""
    draw, project = jax.random.split(key)
    kernel = dense_init(draw, view.shape, layer.param_dtype)
    w = view.to_matrix(nn.meta.unbox(kernel))
    u, v = methods.factor(layer.method, project, w, layer.rank, activation=layer.activation, group=view.group)
    return boxes.like(kernel, view.from_factors(u, v, layer.execution))


class LowRankDense(nn.Module):
    """`nn.Dense` with a kernel of low rank: `y = (x @ u) @ v + b`.

    Its parameters are those that `factorize` leaves in an `nn.Dense`: a `LowRankKernel` called "kernel", and "bias".

    Attributes:
      features: the number of outputs.
      rank: from 1 to min(inputs, features).
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as in `nn.Dense`; `kernel_init` draws the dense kernel.
      method: how it is factored, a name in `methods.METHODS`.
      activation: what follows the layer, a name in `activations.ACTIVATIONS` or any elementwise function in jax.
      execution: `factored` or `merged`, see `LowRankKernel`.
    """

    features: int
    rank: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jax.numpy.float32
    precision: Any = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    method: str = "kernel_projection"
    activation: ActivationLike = "relu"
    execution: Execution = "factored"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`[..., n] -> [..., features]`."""
        view = dense_view((inputs.shape[-1], self.features))
        kernel = self.param("kernel", _factored_kernel, self.kernel_init, view, self)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        plain = nn.Dense(
            self.features,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            parent=None,
        )
        return run_layer(plain, kernel, bias, inputs)


class LowRankConv(nn.Module):
    """`nn.Conv` with a kernel of low rank: a convolution with `rank` filters, then a second one to `features`.

    Its parameters are those that `factorize` leaves in an `nn.Conv`: a `LowRankKernel` called "kernel", and "bias".

    Attributes:
      features: the number of output channels.
      kernel_size: the window.
      rank: from 1 to the full rank of the kernel's matrix.
      strides, padding, input_dilation, kernel_dilation, use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as in
        `nn.Conv`; `kernel_init` draws the dense kernel.
      scheme: `channel` (the whole window, then 1x1) or `spatial` (kh x 1, then 1 x kw; two-dimensional windows only).
      method: how the kernel is factored, a name in `methods.METHODS`.
      activation: what follows the layer, a name in `activations.ACTIVATIONS` or any elementwise function in jax.
      execution: `factored` or `merged`, see `LowRankKernel`.
    """

    features: int
    kernel_size: int | Sequence[int]
    rank: int
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jax.numpy.float32
    precision: Any = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    scheme: Literal["channel", "spatial"] = "channel"
    method: str = "kernel_projection"
    activation: ActivationLike = "relu"
    execution: Execution = "factored"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`[batch, *space, c_in] -> [batch, *space', features]`."""
        window = _window(self)
        shape = (*window, inputs.shape[-1], self.features)
        view = channel_view(shape) if self.scheme == "channel" else spatial_view(shape)
        kernel = self.param("kernel", _factored_kernel, self.kernel_init, view, self)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        plain = nn.Conv(
            self.features,
            window,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            parent=None,
        )
        return run_layer(plain, kernel, bias, inputs)
