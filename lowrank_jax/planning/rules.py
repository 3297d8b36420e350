"""Rules: which kernels to factor, at which rank and how; one kernel at a time.

What weighs kernels against each other, such as a budget, is a function `Plan -> Plan` in a module of its own.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Literal

from lowrank_jax.checks import plain
from lowrank_jax.kernel import MatrixView
from lowrank_jax.patterns import compile_pattern
from lowrank_jax.projection import activations
from lowrank_jax.projection.methods import METHODS
from lowrank_jax.text import did_you_mean, shown

SCHEMES = ("channel", "spatial")
SCALE_OF = ("full_rank", "columns")
EXECUTIONS = ("auto", "factored", "merged", "premerged")
ALL_BUT_LAST = "all_but_last"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with kernels whose full name matches a pattern; without scale, rank and energy they stay dense.

    Attributes:
      path: a regular expression over names such as "stage1/block1/conv1/kernel".
      scale: the rank as a fraction, in (0, 1], of what `scale_of` names; rounded to the nearest, at least 1.
      rank: the rank itself.
      energy: in place of both: the share, above 0 and up to 1, that the rank keeps of the squared singular values of the
        kernel's matrix, as the smallest one that does.  The rank stays open until `allocate` is given the kernels' values.
      scheme: how a convolution becomes a matrix: `channel` (kh x kw -> r, then 1x1) or `spatial` (kh x 1 -> r, then 1 x kw).
      method: how the factors are made from the dense kernel, a name in `methods.METHODS`.
      activation: what follows the kernel, for methods that project functions: a name in `activations.ACTIVATIONS`, or any
        elementwise function in jax.
      multiple_of: round the rank up to a multiple of this number.
      scale_of: `full_rank`, min(rows, columns) of the matrix; or `columns`, which in the spatial scheme is the convention
        round(scale * out * k) of Khodak et al. (ICLR 2021).
      execution: how the layer runs: `factored`, two thin products one after the other; `merged`, the factors' product first,
        then the dense layer; `premerged`, the product before the model sees its parameters; or `auto`, whichever of the first
        two `choose_execution` expects to be faster, and `factored` until it is called.
      rows: which axes of the parameter are the rows of its matrix, (0,) or "all_but_last"; with it, parameters of two or more
        axes in any module are factored, and those that are no kernel of a known layer are `premerged`.  Of a known layer's
        kernel the axes of `nn.scan` and `nn.vmap` do not count; elsewhere they do, so that negative axes are safer.
      normalized: for `allocate`: whether a normalisation of every output by itself follows, such as BatchNorm, so that all
        count the same; by default what `plan` finds.

    Raises:
      ValueError: a field is out of range or unknown, or more than one of scale, rank and energy is given.
    """

    path: str
    _: dataclasses.KW_ONLY
    scale: float | None = None
    rank: int | None = None
    energy: float | None = None
    scheme: Literal["channel", "spatial"] = "channel"
    method: str = "kernel_projection"
    activation: activations.ActivationLike = "relu"
    multiple_of: int = 1
    scale_of: Literal["full_rank", "columns"] = "full_rank"
    execution: Literal["auto", "factored", "merged", "premerged"] = "auto"
    rows: tuple[int, ...] | Literal["all_but_last"] | None = None
    normalized: bool | None = None

    def __post_init__(self):
        if not isinstance(self.path, str):
            raise self._error("path must be a string")
        compile_pattern(self.path)
        for name in ("scale", "rank", "energy", "multiple_of"):
            object.__setattr__(self, name, plain(getattr(self, name)))  # of NumPy or jax
        for name in ("scale", "energy"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise self._error(f"{name} {shown(value)} must be a number")
        for name in ("rank", "multiple_of"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise self._error(f"{name} {shown(value)} must be a whole number")
        given = [name for name in ("scale", "rank", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            both = " and ".join(f"{name} {shown(getattr(self, name))}" for name in given)
            raise self._error(f"has {'both ' if len(given) == 2 else ''}{both}; give one")
        for name in ("scale", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise self._error(f"{name} {shown(value)} must be in (0, 1]")
        for name in ("rank", "multiple_of"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**63:
                complaint = "must be at least 1" if value < 1 else "must have at most 64 bits"
                raise self._error(f"{name} {shown(value)} {complaint}")
        self._check_name("scheme", SCHEMES)
        self._check_name("method", METHODS)
        try:
            activations.get(self.activation)
        except ValueError as error:
            raise self._error(str(error)) from None
        self._check_name("scale_of", SCALE_OF)
        self._check_name("execution", EXECUTIONS)
        if self.normalized is not None and type(self.normalized) is not bool:
            raise self._error(f"normalized {shown(self.normalized)} must be True, False or None")
        if isinstance(self.rows, list):  # of a config file
            object.__setattr__(self, "rows", tuple(self.rows))
        if self.rows is not None and self.rows != ALL_BUT_LAST and not _are_axes(self.rows):
            raise self._error(f'rows {shown(self.rows)} must be different axes, such as (0,), or "{ALL_BUT_LAST}"')

    def _check_name(self, field: str, known: Collection[str]) -> None:
        name = getattr(self, field)
        if not isinstance(name, str) or name not in known:
            raise self._error(f"unknown {field} {shown(name)}{did_you_mean(name, known)}")

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"rule {shown(self.path)}: {problem}")


def _are_axes(rows: object) -> bool:
    whole = isinstance(rows, tuple) and rows and all(type(axis) is int for axis in rows)
    return bool(whole and len(set(rows)) == len(rows))  # type: ignore[arg-type]


def rows_view(rule: Rule, shape: tuple[int, ...]) -> MatrixView:
    """A parameter as a matrix whose rows are the axes that the rule names.

    Raises:
      ValueError: it does not have these axes, or no others.
    """
    axes = range(len(shape))
    if rule.rows == ALL_BUT_LAST:
        return MatrixView(shape, tuple(axes[:-1]))
    if any(axis not in range(-len(shape), len(shape)) for axis in rule.rows or ()):
        raise ValueError(f"has no axes {shown(rule.rows)}, which the rule names as its rows")
    rows = tuple(sorted({axes[axis] for axis in rule.rows or ()}))
    if len(rows) in (0, len(shape)):
        raise ValueError(f"rows {shown(rule.rows)} leave no axis for the columns")
    return MatrixView(shape, rows)


def wanted_rank(rule: Rule, view: MatrixView) -> int | None:
    """The rank that a rule asks for, before any check that it saves anything; None for dense, and for an energy."""
    if rule.scale is not None:
        return rank_at(rule, view, rule.scale)
    return None if rule.rank is None else rounded_up(rule, rule.rank)


def rank_at(rule: Rule, view: MatrixView, scale: float) -> int:
    """The rank that a rule would ask for at another scale."""
    whole = view.full_rank if rule.scale_of == "full_rank" else view.m
    return rounded_up(rule, max(1, round_half_up(scale * whole)))


def rounded_up(rule: Rule, rank: int) -> int:
    """To the rule's multiple."""
    return -(-rank // rule.multiple_of) * rule.multiple_of


def round_half_up(x: float) -> int:
    """To the nearest integer, halves up: Python's own rounding would send 0.5 to 0 and 1.5 to 2."""
    return math.floor(x + 0.5)
