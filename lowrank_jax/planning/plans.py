"""A plan: for every kernel of a model the rank that it will have, or the reason why it stays dense."""

import dataclasses
import math

from lowrank_jax.kernel import Execution, MatrixView
from lowrank_jax.planning.rules import Rule
from lowrank_jax.text import align, count, with_change


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The activations around a kernel, an example.

    Attributes:
      inputs: elements that the layer reads.
      positions: at which it has outputs.
      hidden_positions: at which the first stage has, that runs on a factor.
    """

    inputs: int
    positions: int
    hidden_positions: int


@dataclasses.dataclass(frozen=True)
class PlannedKernel:
    """One line of a plan.

    Attributes:
      name: the parameter's name.
      shape: its shape as stored, stack axes included.
      view: the kernel as a matrix; None where it stays dense.
      rank: the rank; None where it stays dense.
      rule: the rule that decided; None if none matches.
      note: why it stays dense; empty where it is factored.
      macs: multiply-accumulates of the dense kernel, an example.
      planned_macs: the same as planned.
      traffic: what the layer reads and writes, where it is factored.
      execution: how the layer will run, where it is factored and that is known.
    """

    name: str
    shape: tuple[int, ...]
    view: MatrixView | None
    rank: int | None
    rule: Rule | None
    note: str
    macs: int
    planned_macs: int
    traffic: "Traffic | None" = None
    execution: Execution | None = None

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    @property
    def planned_params(self) -> int:
        if self.view is None or self.rank is None:
            return self.params
        copies = math.prod(self.shape) // math.prod(self.view.shape)
        return copies * self.rank * (self.view.n + self.view.m)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `factorize` will do to a model; `print` it for a table.

    Attributes:
      kernels: a line for every parameter with at least two axes.
      other_params: how many parameters the model has besides.
    """

    kernels: tuple[PlannedKernel, ...]
    other_params: int

    @property
    def factored(self) -> tuple[PlannedKernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.rank is not None)

    @property
    def params(self) -> int:
        """Parameters as planned, everything included."""
        return self.other_params + sum(kernel.planned_params for kernel in self.kernels)

    @property
    def dense_params(self) -> int:
        return self.other_params + sum(kernel.params for kernel in self.kernels)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all kernels as planned, an example."""
        return sum(kernel.planned_macs for kernel in self.kernels)

    @property
    def dense_macs(self) -> int:
        return sum(kernel.macs for kernel in self.kernels)

    def rows(self) -> list[list[str]]:
        """The table as text: a header, a row a kernel, a row for all other parameters and the total."""
        body = [_row(kernel) for kernel in self.kernels]
        rest = ["(biases, norms, ...)", "", "-", "dense", "", count(self.other_params), "", ""]
        total = [
            "total", "", "", "", "",
            with_change(self.params, self.dense_params), with_change(self.macs, self.dense_macs), "",
        ]  # fmt: skip
        return [["parameter", "shape", "rank", "method", "execution", "params", "MACs", "note"], *body, rest, total]

    def __str__(self) -> str:
        return align(self.rows())


def _row(kernel: PlannedKernel) -> list[str]:
    method = kernel.rule.method if kernel.rank is not None and kernel.rule is not None else "dense"
    return [
        kernel.name,
        "x".join(map(str, kernel.shape)),
        "-" if kernel.rank is None else str(kernel.rank),
        method,
        _execution(kernel),
        with_change(kernel.planned_params, kernel.params),
        with_change(kernel.planned_macs, kernel.macs) if kernel.macs else "-",
        kernel.note,
    ]


def _execution(kernel: PlannedKernel) -> str:
    if kernel.rank is None or kernel.rule is None:
        return ""
    return kernel.execution or kernel.rule.execution
