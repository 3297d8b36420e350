"""The layers that run on factors: `nn.Dense`, `nn.DenseGeneral` and `nn.Conv`, and those of other classes that are registered.

A layer of a subclass is known as well, unless the subclass replaces a method: then its kernel may mean something else.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen.dtypes import promote_dtype

from lowrank_jax.checks import plain
from lowrank_jax.text import shown

Rows = tuple[int, ...]

# What the layers of flax call in place of a product or a promotion of dtypes; two stages would call it twice.
_HOOKS = dict.fromkeys(("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls"))
_HOOKS |= {"promote_dtype": promote_dtype}
_SPECIAL = ("__call__", "__getattr__", "__getattribute__", "__setattr__", "__post_init__")


@dataclasses.dataclass(frozen=True)
class KnownLayer:
    """A class of layers that run on factors.

    Attributes:
      base: the class.
      kernels: the names of its kernels, below the layer: "kernel", or "ii/kernel" of a module inside.
      rows: which axes of a kernel are the rows of its matrix, from the layer; None for a convolution, whose rule chooses.
      run: what the layer computes, from the layer, its parameters with factor pairs in them, and its arguments; None where
        lowrank_jax does it: in two stages, or one if merged.
    """

    base: type[nn.Module]
    kernels: tuple[str, ...] = ("kernel",)
    rows: Callable[[Any], Rows] | None = None
    run: Callable[..., Any] | None = None


def _general_rows(layer: nn.DenseGeneral) -> Rows:
    return tuple(range(1 if isinstance(layer.axis, int) else len(layer.axis)))


BUILT_IN = (nn.Dense, nn.DenseGeneral, nn.Conv)

_KNOWN: dict[type[nn.Module], KnownLayer] = {
    nn.Dense: KnownLayer(nn.Dense, rows=lambda layer: (0,)),
    nn.DenseGeneral: KnownLayer(nn.DenseGeneral, rows=_general_rows),
    nn.Conv: KnownLayer(nn.Conv),
}


def register_layer(
    cls: type[nn.Module],
    *,
    kernel: str | Sequence[str] = "kernel",
    rows: int | Sequence[int] | Callable[[Any], int | Sequence[int]] = (0,),
    run: Callable[..., jax.Array] | None = None,
) -> None:
    """Lets the layers of a class run on factors; otherwise their kernels stay dense, or are `premerged`.

    By default the layer has to multiply the last axes of its first argument with the kernel, and the kernel's shape has to
    follow from that argument; an attribute `axis` of the layer says which axes.  It then runs in two stages: x is multiplied
    with U, and the layer itself is called on the result, with V for its kernel.  A layer for which that is another function
    stays dense, and the plan says why.

        lr.register_layer(FlaxConv1D, rows=1)  # GPT-2 stores it as [out, in]
        lr.register_layer(DenseGeneral)  # T5's in t5x: as [in, out], however many axes of x these are
        lr.register_layer(DenseGeneral, rows=lambda layer: range(np.size(layer.axis)))  # scalable T5's: as [*in, *out]

    Args:
      cls: a Linen module with a kernel of its own.
      kernel: the parameter's name, or those of several, such as "ii/kernel" for one of a module inside.
      rows: the kernel's axes that the layer sums over, ascending, in the order of the argument's last axes; or a function that
        tells them from the layer.
      run: `run(layer, params, *args, **kwargs)`, for all other layers: what `layer(*args, **kwargs)` computes; the kernels in
        `params` are `LowRankKernel`s, those that stay dense are arrays.

    Raises:
      TypeError: `cls` is not a class of Linen modules, `kernel` is no name, or `run` no function.
      ValueError: there are several kernels and no `run`, or rows are no ascending axes.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer takes a class of flax.linen modules, not {cls!r}")
    names = (kernel,) if isinstance(kernel, str) else tuple(kernel) if isinstance(kernel, Sequence) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"kernel must be the name of a parameter, or several, not {shown(kernel)}")
    if run is not None and not callable(run):
        raise TypeError(f"run must be a function, not {shown(run)}")
    if len(names) != 1 and run is None:
        raise ValueError(f"{cls.__name__} has {len(names)} kernels: say with run= how it computes on factors")

    def given(layer: Any) -> Rows:
        found = rows(layer) if callable(rows) else rows
        axes = tuple(map(plain, found if isinstance(found, Iterable) and np.ndim(found) else (found,)))  # type: ignore[arg-type]
        if not axes or any(type(axis) is not int or axis < 0 for axis in axes) or list(axes) != sorted(set(axes)):
            raise ValueError(f"rows {axes} of {cls.__name__} must be axes of its kernel, counted from 0 and ascending")
        return axes

    if not callable(rows):
        given(cls)
    _KNOWN[cls] = KnownLayer(cls, names, given, run)


def find(layer: nn.Module) -> KnownLayer | None:
    """How a module runs on factors; None if it does not."""
    known = _nearest(layer)
    return None if known is None or refusal(layer) else known


def refusal(layer: nn.Module) -> str:
    """Why a module does not run on factors; empty if it does."""
    name, known = type(layer).__name__, _nearest(layer)
    if known is None:
        return f"{name} is not a known layer: a rule with rows=... factors its kernel, lr.register_layer teaches its class"
    if replaced := _replaced(type(layer), known.base):
        return f"{name} replaces {replaced} of {known.base.__name__}: a rule with rows=... factors its kernel"
    hook = next((hook for hook, default in _HOOKS.items() if getattr(layer, hook, default) is not default), None)
    if known.base in BUILT_IN and hook:
        return f"computes with its own {hook}"
    if isinstance(layer, nn.DenseGeneral) and layer.batch_dims != ():  # 0 names an axis
        return "batch_dims is not supported"
    if isinstance(layer, nn.Conv) and layer.feature_group_count > 1:
        depthwise = layer.feature_group_count == layer.features
        return "depthwise convolution" if depthwise else f"grouped convolution ({layer.feature_group_count} groups)"
    if isinstance(layer, nn.Conv) and layer.mask is not None:
        return "masked convolution"
    return ""


def is_measured(layer: nn.Module) -> bool:
    """Whether it is known at how many positions a module applies its kernel."""
    known = _nearest(layer)
    return known is not None and known.run is None and not _replaced(type(layer), known.base)


def is_built_in(layer: nn.Module) -> bool:
    """Whether lowrank_jax itself knows how a module computes."""
    known = _nearest(layer)
    return known is not None and known.base in BUILT_IN


def has_own_run(layer: nn.Module) -> bool:
    """Whether only the module knows how it computes with its kernels."""
    known = _nearest(layer)
    return known is not None and known.run is not None


def kernel_of(layer: nn.Module, name: str) -> Any:
    """A layer's kernel by its name below it, without its box; None if it has none."""
    node: Any = layer.variables.get("params", {})
    for part in name.split("/"):
        node = node.get(part) if isinstance(node, Mapping) else None
    return None if isinstance(node, Mapping) else nn.meta.unbox(node)  # a module inside may have the name of a kernel


def kernels_of(layer: nn.Module) -> tuple[str, ...]:
    """The names of what a module may use as kernels, below it."""
    known = _nearest(layer)
    return ("kernel",) if known is None else known.kernels


def rows_of(layer: nn.Module) -> Rows | None:
    """The row axes of a layer's kernels; None for a convolution, and where only the module itself knows."""
    known = _nearest(layer)
    return None if known is None or known.rows is None else known.rows(layer)


def summed_axes(shape: Sequence[int], n: int) -> int:
    """How many of the last axes of an input of this shape a registered layer sums over, with a kernel of n rows.

    Raises:
      ValueError: no number of them has n elements.
    """
    for axes in range(1, len(shape) + 1):
        if math.prod(shape[len(shape) - axes :]) == n:
            return axes
    raise ValueError(f"no last axes of an input of shape {list(shape)} have {n} elements, as a kernel of {n} rows needs")


def first_argument(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer is called on, given by its place or by its name."""
    if args:
        return args[0]
    name = _first_name(type(layer))
    if name not in kwargs:
        raise TypeError(f"{type(layer).__name__} is called without its argument {name!r}")
    return kwargs[name]


def with_first_argument(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any) -> tuple[Any, Any]:
    """The arguments with another one in that place."""
    return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, _first_name(type(layer)): x})


@functools.cache
def _first_name(cls: type[nn.Module]) -> str:
    return list(inspect.signature(cls.__call__).parameters)[1]


def _nearest(layer: nn.Module) -> KnownLayer | None:
    return next((_KNOWN[cls] for cls in type(layer).__mro__ if cls in _KNOWN), None)


@functools.cache
def _replaced(cls: type, base: type) -> str:
    """The first method of `base` that `cls`, or a class between them, replaces; empty if none does."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for between in cls.__mro__:
        if between in base.__mro__:
            continue
        for name, value in vars(between).items():
            ours = name in _SPECIAL or not name.startswith("__")
            if ours and name not in fields and hasattr(base, name) and (callable(value) or hasattr(value, "__get__")):
                return name
    return ""
