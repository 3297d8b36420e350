"""A plan: for every kernel of a model the rank that it will have, or the reason why it stays dense."""

import abc
import dataclasses
import math
from typing import Any

from lowrank_jax.kernel import Execution, MatrixView
from lowrank_jax.planning.rules import Rule
from lowrank_jax.projection.curves import Normalization
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
    """One line of a plan: a `FactoredKernel`, a `DenseKernel` or an `OpenKernel`.

    Attributes:
      name: the parameter's name.
      shape: its shape as stored, stack axes included.
      macs: multiply-accumulates of the dense kernel, per example; 0 if unknown.
      rule: the rule that decided; None if none matches.
      choices: the ways to factor the kernel that are open to a budget, the rule's own scheme first; empty where the rule, or
        the layer, keeps the kernel dense.
      execution: how its layer runs on factors, or would; None if that is not known yet.
      own_run: whether its layer computes with it in a way that only the layer knows (`register_layer(run=...)`).
      normalized: which normalisation was found to follow its layer; None if none was, and its rule may know better.
      bounds: of a rule with an energy, once the kernel's values are known: the rank that keeps it, by choice.
      note: why it is as it is.
      risk: what kernel projection at the planned rank loses of its layer's function, relative to all of it; None unless a
        budget was allocated.
      divergence: what its rank adds to the network's loss, to second order; None unless a budget was allocated with gradients.
      next_gain: what the next per cent of the budget would take off what the objective counts here, in proportion where the
        next rank needs more; None if nothing is lost.
    """

    name: str
    shape: tuple[int, ...]
    macs: int
    rule: Rule | None
    choices: tuple[Choice, ...] = ()
    execution: Execution | None = None
    own_run: bool = False
    normalized: Normalization | None = dataclasses.field(default=None, compare=False)  # what budgets know besides
    bounds: tuple[int | None, ...] = dataclasses.field(default=(), compare=False)
    note: str = ""
    risk: float | None = dataclasses.field(default=None, compare=False)  # plans of the same ranks are equal
    divergence: float | None = dataclasses.field(default=None, compare=False)
    next_gain: float | None = dataclasses.field(default=None, compare=False)

    @property
    def shared(self) -> dict[str, Any]:
        """The fields that do not depend on the rank, for another line of the same kernel."""
        names = ("name", "shape", "macs", "rule", "choices", "own_run", "normalized", "bounds")
        return {name: getattr(self, name) for name in names}

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes that `nn.scan` and `nn.vmap` add to a repeated module's parameters, if it can be factored."""
        return self.shape[: len(self.shape) - len(self.choices[0].view.shape)] if self.choices else ()

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

    def worth(self) -> dict[str, str]:
        """What its rank loses, and what more of the budget would buy, as text by the column's name."""
        values = {"risk": (self.risk, 4), "divergence": (self.divergence, 5), "next 1%": (self.next_gain, 5)}
        return {name: "-" if value is None else f"{value:.{digits}f}" for name, (value, digits) in values.items()}

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
    """

    rule: Rule
    choice: Choice
    rank: int

    @property
    def view(self) -> MatrixView:
        """The kernel as a matrix, without stack axes."""
        return self.choice.view

    @property
    def traffic(self) -> Traffic:
        """What the layer reads and writes."""
        return self.choice.traffic

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
    """A kernel that stays as it is."""

    @property
    def planned_params(self) -> int:
        return self.params

    @property
    def planned_macs(self) -> int:
        return self.macs

    def _cells(self) -> tuple[str, str, str, str]:
        return "-", "dense", "", self.note


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenKernel(DenseKernel):
    """A kernel whose rank depends on its values, by a rule that gives an energy; until these are known it counts as dense.

    Attributes:
      rule: the rule that decided.
      until: when its values will be known, for plans to go on with until then; None if nothing can be done before they are.
    """

    rule: Rule
    until: str | None = None

    def _cells(self) -> tuple[str, str, str, str]:
        open_ = "the rank is open: lr.allocate(plan, variables=variables)"
        if self.until:
            open_ = f"the rank is open until {self.until}; dense here"
        note = f"{open_}; {self.note}" if self.note else open_
        return f"energy {self.rule.energy}", self.rule.method, self.execution or self.rule.execution, note


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
        """The kernels that will be factored.

        Raises:
          ValueError: a rank is open, and nothing is said of when it will be known.
        """
        if open_ := [kernel.name for kernel in self.waiting if not kernel.until]:
            more = f" and {len(open_) - 1} more" if len(open_) > 1 else ""
            raise ValueError(
                f"the plan has no rank for {open_[0]!r}{more}, whose rule gives an energy: "
                "plan = lr.allocate(plan, variables=variables) finds it"
            )
        return tuple(kernel for kernel in self.kernels if isinstance(kernel, FactoredKernel))

    @property
    def waiting(self) -> tuple[OpenKernel, ...]:
        """The kernels whose ranks are open."""
        return tuple(kernel for kernel in self.kernels if isinstance(kernel, OpenKernel))

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

    def opened(self) -> "Plan":
        """The same with every kernel that is open to a budget factored at rank 1, in its rule's own scheme.

        For `inputs.second_moments`, which `allocate` takes: the inputs of a kernel do not depend on its rank.
        """

        def opened(kernel: PlannedKernel) -> PlannedKernel:
            if not isinstance(kernel, DenseKernel) or not kernel.choices:
                return kernel
            return FactoredKernel(**kernel.shared, execution=kernel.execution, choice=kernel.choices[0], rank=1)

        return dataclasses.replace(self, kernels=tuple(map(opened, self.kernels)))

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
        rows = [header, *(kernel.row() for kernel in self.kernels), rest, total]
        if all(kernel.risk is None for kernel in self.kernels):
            return rows
        lost = [kernel.divergence for kernel in self.kernels if kernel.divergence is not None]
        columns = ["risk", "divergence", "next 1%"] if lost else ["risk", "next 1%"]
        sums = [f"{sum(lost):.5f}" if column == "divergence" else "" for column in columns]
        worth = [
            columns,
            *([kernel.worth()[column] for column in columns] for kernel in self.kernels),
            [""] * len(columns),
            sums,
        ]
        return [[*row[:-1], *more, row[-1]] for row, more in zip(rows, worth, strict=True)]

    def __str__(self) -> str:
        return align(self.rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.rows())
