"""A plan: for every kernel of a model the rank that it will have, or the reason why it stays dense."""

import abc
import dataclasses
import math

from lowrank_jax.kernel import Execution, MatrixView
from lowrank_jax.planning.rules import Rule
from lowrank_jax.text import align, count, html_table, with_change


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The activations around a kernel, over a whole batch.

    Attributes:
      batch: the number of examples.
      inputs: elements that the layer reads.
      positions: at which it has outputs.
      hidden_positions: at which the first stage has outputs, the one that runs on the factor U.
    """

    batch: int
    inputs: int
    positions: int
    hidden_positions: int

    @classmethod
    def traced(cls, batch: int, inputs: int, positions: int, hidden_positions: int) -> "Traffic":
        """In lowest terms, so that plans of one model do not depend on the batch that traced it."""
        common = math.gcd(batch, inputs, positions, hidden_positions) or 1
        return cls(batch // common, inputs // common, positions // common, hidden_positions // common)

    @classmethod
    def unknown(cls) -> "Traffic":
        """Of a parameter that no known layer uses."""
        return cls(1, 0, 0, 0)

    def scaled(self, batch: int) -> "Traffic":
        """The same for another batch size."""
        return Traffic(
            batch,
            batch * (self.inputs // self.batch),
            batch * (self.positions // self.batch),
            batch * (self.hidden_positions // self.batch),
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to factor a kernel; the rank is open, up to `view.full_rank`.

    Attributes:
      view: the kernel as a matrix.
      traffic: what the layer and its stages read and write then.
    """

    view: MatrixView
    traffic: Traffic

    def macs(self, rank: int) -> int:
        """Multiply-accumulates of both stages at this rank, per example."""
        first, second = self.traffic.hidden_positions * self.view.n, self.traffic.positions * self.view.m
        return rank * (first + second) // self.traffic.batch

    def params(self, rank: int) -> int:
        """Parameters of both factors at this rank, without stack axes."""
        return rank * (self.view.n + self.view.m)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedKernel(abc.ABC):
    """One line of a plan: a `FactoredKernel` or a `DenseKernel`.

    Attributes:
      name: the parameter's name.
      shape: its shape as stored, stack axes included.
      macs: multiply-accumulates of the dense kernel, per example; 0 if unknown.
      rule: the rule that decided; None if none matches.
      choices: the ways to factor the kernel that are open to a budget, the rule's own scheme first; empty where the rule, or
        the layer, keeps the kernel dense.
    """

    name: str
    shape: tuple[int, ...]
    macs: int
    rule: Rule | None
    choices: tuple[Choice, ...] = ()

    @property
    def params(self) -> int:
        """Parameters of the dense kernel."""
        return math.prod(self.shape)

    @property
    @abc.abstractmethod
    def planned_params(self) -> int:
        """Parameters as planned."""

    @property
    @abc.abstractmethod
    def planned_macs(self) -> int:
        """Multiply-accumulates as planned, per example."""

    def row(self) -> list[str]:
        """The kernel's row of the plan's table."""
        rank, method, execution, note = self._cells()
        params = with_change(self.planned_params, self.params)
        macs = with_change(self.planned_macs, self.macs) if self.macs else "-"
        return [self.name, "x".join(map(str, self.shape)), rank, method, execution, params, macs, note]

    @abc.abstractmethod
    def _cells(self) -> tuple[str, str, str, str]:
        """Rank, method, execution and note, as text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoredKernel(PlannedKernel):
    """A kernel that `factorize` replaces by a pair of factors.

    Attributes:
      rule: the rule that decided.
      choice: which of `choices` was taken.
      rank: the rank.
      execution: how the layer will run; None if that is not known yet.
      own_run: whether its layer computes with it in a way that only the layer knows (`register_layer(run=...)`).
      note: why the execution is not the rule's own.
    """

    rule: Rule
    choice: Choice
    rank: int
    execution: Execution | None = None
    own_run: bool = False
    note: str = ""

    @property
    def view(self) -> MatrixView:
        """The kernel as a matrix, without stack axes."""
        return self.choice.view

    @property
    def traffic(self) -> Traffic:
        """What the layer reads and writes."""
        return self.choice.traffic

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes that `nn.scan` and `nn.vmap` add to a repeated module's parameters."""
        return self.shape[: len(self.shape) - len(self.view.shape)]

    @property
    def planned_params(self) -> int:
        return math.prod(self.stack) * self.choice.params(self.rank)

    @property
    def planned_macs(self) -> int:
        if self.execution in ("merged", "premerged"):
            return self.macs
        return self.choice.macs(self.rank)

    def _cells(self) -> tuple[str, str, str, str]:
        return str(self.rank), self.rule.method, self.execution or self.rule.execution, self.note


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseKernel(PlannedKernel):
    """A kernel that stays as it is.

    Attributes:
      note: why.
    """

    note: str

    @property
    def planned_params(self) -> int:
        return self.params

    @property
    def planned_macs(self) -> int:
        return self.macs

    def _cells(self) -> tuple[str, str, str, str]:
        return "-", "dense", "", self.note


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What `factorize` will do to a model; shown as a table, also in notebooks.

    Attributes:
      kernels: a line for every parameter with at least two axes.
      other_params: how many parameters the model has besides.
      slashed: keys of the model's variables that have a slash in them, which their names do not tell from paths.
    """

    kernels: tuple[PlannedKernel, ...]
    other_params: int
    slashed: tuple[str, ...] = ()

    @property
    def factored(self) -> tuple[FactoredKernel, ...]:
        """The kernels that will be factored."""
        return tuple(kernel for kernel in self.kernels if isinstance(kernel, FactoredKernel))

    @property
    def captured(self) -> tuple[FactoredKernel, ...]:
        """Those whose inputs can be captured: what multiplies them with what is known."""
        return tuple(kernel for kernel in self.factored if kernel.execution != "premerged" and not kernel.own_run)

    @property
    def params(self) -> int:
        """Parameters as planned, everything included."""
        return self.other_params + sum(kernel.planned_params for kernel in self.kernels)

    @property
    def dense_params(self) -> int:
        """Parameters of the dense model, everything included."""
        return self.other_params + sum(kernel.params for kernel in self.kernels)

    @property
    def macs(self) -> int:
        """Multiply-accumulates as planned of all kernels whose MACs are known, per example."""
        return sum(kernel.planned_macs for kernel in self.kernels)

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates in the dense model of all kernels whose MACs are known, per example."""
        return sum(kernel.macs for kernel in self.kernels)

    def rows(self) -> list[list[str]]:
        """The table as text: a header, a row per kernel, a row for all other parameters and the total."""
        rest = ["(biases, norms, ...)", "", "-", "dense", "", count(self.other_params), "", ""]
        unknown = sum(not kernel.macs for kernel in self.kernels)
        total = [
            "total", "", "", "", "",
            with_change(self.params, self.dense_params), with_change(self.macs, self.dense_macs),
            f"without the MACs of {unknown}, which {'is' if unknown == 1 else 'are'} not known" if unknown else "",
        ]  # fmt: skip
        header = ["parameter", "shape", "rank", "method", "execution", "params", "MACs", "note"]
        return [header, *(kernel.row() for kernel in self.kernels), rest, total]

    def __str__(self) -> str:
        return align(self.rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.rows())
