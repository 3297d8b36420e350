"""Layers on factored kernels: two thin linear operations in place of one, inside any Linen model or as modules of their own.

Both stages are Flax layers themselves, so padding, dilation, precision and dtype promotion mean exactly what they mean there.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax

from lowrank_jax import methods
from lowrank_jax.activations import ActivationLike
from lowrank_jax.discover import SUPPORTED
from lowrank_jax.kernel import SPATIAL_ROWS, LowRankKernel, MatrixView, channel_view, dense_view, spatial_view

Initializer = Callable[..., jax.Array]


def apply(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.apply`, where any kernel in `variables["params"]` may be a `LowRankKernel`.

    Takes and returns what `model.apply` does (`rngs=`, `mutable=`, `method=`, ...).  A layer whose kernel is factored
    computes `(x @ u) @ v` without forming the product; every other layer runs as its author wrote it.
    """
    with nn.intercept_methods(_intercept):
        return model.apply(variables, *args, **kwargs)


def takes_factors(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], variables: Any) -> bool:
    """Whether the model runs on these variables, shapes that may hold factor pairs.

    Wrappers such as `nn.WeightNorm` read the kernels of the layers that they wrap, and do not know factor pairs.
    """

    others = [name for name in variables if name != "params"]  # a missing parameter must not be made up

    def run(variables, inputs):
        return apply(model, variables, *inputs, **kwargs, mutable=others, rngs={"params": jax.random.key(0)})

    try:
        jax.eval_shape(run, variables, inputs)
    except Exception:  # whatever somebody's module may raise
        return False
    return True


def _intercept(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, SUPPORTED):
        return next_fun(*args, **kwargs)
    kernel = module.get_variable("params", "kernel")
    if not isinstance(kernel, LowRankKernel):
        return next_fun(*args, **kwargs)
    x = args[0] if args else kwargs["inputs"]
    return two_stages(module, kernel, module.get_variable("params", "bias"), x)


def two_stages(module: nn.Module, kernel: LowRankKernel, bias: Any, x: jax.Array) -> Any:
    """What an `nn.Dense`, `nn.DenseGeneral` or `nn.Conv` computes from `x`, its kernel given as a factor pair.

    Args:
      module: the layer, for its settings; its own parameters are not read.
      kernel: the factor pair, without stack axes.
      bias: the layer's bias, or None if it has none.
      x: its input.
    """
    first, u, second, v = _conv_stages(module, kernel) if isinstance(module, nn.Conv) else _dense_stages(module, kernel)
    hidden = first.apply({"params": {"kernel": u}}, x)
    return second.apply({"params": {"kernel": v} if bias is None else {"kernel": v, "bias": bias}}, hidden)


def _dense_stages(module: Any, kernel: LowRankKernel):
    first = module.clone(features=kernel.rank, use_bias=False, name=None)
    second = module.clone(name=None)
    if isinstance(second, nn.DenseGeneral):
        second = second.clone(axis=-1)
    return first, kernel.u, second, kernel.v


def _conv_stages(module: nn.Conv, kernel: LowRankKernel):
    if kernel.rows == SPATIAL_ROWS:
        return _spatial_stages(module, kernel)
    first = module.clone(features=kernel.rank, use_bias=False, name=None)
    # A dot product computes a 1x1 convolution with a much faster weight gradient on CPU.
    second = nn.Dense(
        module.features,
        use_bias=module.use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        precision=module.precision,
        parent=None,
    )
    if _is_pointwise(module):
        return second.clone(features=kernel.rank, use_bias=False), kernel.u.reshape(-1, kernel.rank), second, kernel.v
    return first, kernel.u, second, kernel.v


def _is_pointwise(module: nn.Conv) -> bool:
    size = (module.kernel_size,) if isinstance(module.kernel_size, int) else module.kernel_size
    unit = (None, 1)
    return (
        all(k == 1 for k in size)
        and isinstance(module.padding, str)
        and all(s in unit for s in _per_axis(module.strides, len(size)))
        and all(s in unit for s in _per_axis(module.input_dilation, len(size)))
    )


def _spatial_stages(module: nn.Conv, kernel: LowRankKernel):
    """kh x 1 with r filters, then 1 x kw: strides, dilations and padding go to the stage that has their axis."""
    kh, kw = kernel.u.shape[0], kernel.v.shape[1]
    strides = _per_axis(module.strides, 2)
    dilation = _per_axis(module.kernel_dilation, 2)
    input_dilation = _per_axis(module.input_dilation, 2)
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

    first = stage(0, (kh, 1), features=kernel.rank, use_bias=False)
    second = stage(1, (1, kw))
    return first, kernel.u[:, None], second, kernel.v.swapaxes(0, 1)[None]


def _per_axis(setting: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    if setting is None or isinstance(setting, int):
        return (setting or 1,) * axes
    return tuple(setting)


def _only(axis: int, setting: tuple[int, ...]) -> tuple[int, int]:
    return (setting[0], 1) if axis == 0 else (1, setting[1])


def _padding_per_axis(padding: Any) -> tuple[Any, Any]:
    """Padding for the two stages.  Named paddings pad nothing along an axis of window size one."""
    if isinstance(padding, str):
        return padding, padding
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return (rows, 0), (0, columns)


def _factored_kernel(key: jax.Array, dense_init: Initializer, view: MatrixView, layer: Any) -> LowRankKernel:
    """Draws the dense kernel as the plain layer would, then factors it."""
    draw, project = jax.random.split(key)
    w = view.to_matrix(dense_init(draw, view.shape, layer.param_dtype))
    u, v = methods.factor(layer.method, project, w, layer.rank, activation=layer.activation, group=view.group)
    return view.from_factors(u, v)


class LowRankDense(nn.Module):
    """`nn.Dense` with a kernel of low rank: `y = (x @ u) @ v + b`.

    Its parameters are those that `factorize` leaves in an `nn.Dense`: a `LowRankKernel` called "kernel", and "bias".

    Attributes:
      features: the number of outputs.
      rank: from 1 to min(inputs, features).
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as in `nn.Dense`; `kernel_init` draws the dense kernel.
      method: how it is factored, a name in `methods.METHODS`.
      activation: what follows the layer, a name in `activations.ACTIVATIONS` or any elementwise function in jax.
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
        return two_stages(plain, kernel, bias, inputs)


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

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`[batch, *space, c_in] -> [batch, *space', features]`."""
        window = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
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
        return two_stages(plain, kernel, bias, inputs)
