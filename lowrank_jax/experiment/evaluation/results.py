"""What an evaluation finds, and the table that shows it."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from lowrank_jax.comparison import Fidelity
from lowrank_jax.experiment.best import measured
from lowrank_jax.experiment.evaluation import selection
from lowrank_jax.experiment.evaluation.against import Against
from lowrank_jax.experiment.evaluation.classes import Classes
from lowrank_jax.text import align, count, one_line

_WORST = 5  # layers on the screen


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of a checkpoint.

    Attributes:
      split: what it was evaluated on.
      step: the checkpoint's.
      metrics: from `evaluate`; of the averaged weights if the run keeps an average.
      raw_metrics: of the raw weights, if the run keeps an average; otherwise None.
      params, dense_params: the number of parameters of the network, and of the dense one.
      damaged: the reason by newer step that could not be used.
      classes, raw_classes: of the same weights, how well each class is recognised; None where that was not counted.
      data_changed: what of the run's own data has changed since it was trained.
      fidelity: how far the network is from another one, with averaged weights of both where runs keep them; None if it was not
        compared.
      against: the other one.
    """

    split: str
    step: int
    metrics: dict[str, float]
    raw_metrics: dict[str, float] | None
    params: int
    dense_params: int
    damaged: dict[int, str]
    classes: Classes | None = dataclasses.field(default=None, repr=False)
    raw_classes: Classes | None = dataclasses.field(default=None, repr=False)
    data_changed: tuple[str, ...] = ()
    fidelity: Fidelity | None = dataclasses.field(default=None, repr=False)
    against: Against | None = None

    def header(self) -> list[str]:
        return ["split", "examples", *measured(self.metrics), *self._compared(), "step", "params", "dense params"]

    def _compared(self) -> dict[str, str]:
        """How far it is from another network, by the title of a column."""
        return self.fidelity.figures() if self.fidelity else {}

    def rows(self) -> list[list[str]]:
        """Rows of a table: one, or one each for averaged and raw weights."""
        if self.raw_metrics is None:
            return [self._row(self.split, self.metrics)]
        averaged = self._row(f"{self.split}, averaged", self.metrics)
        return [averaged, self._row(f"{self.split}, raw", self.raw_metrics, compared=False)]

    def _row(self, split: str, metrics: dict[str, float], *, compared: bool = True) -> list[str]:
        scores = [f"{metrics[name]:.4f}" for name in measured(self.metrics)]
        scores += [text if compared else "" for text in self._compared().values()]
        examples = f"{metrics['examples']:,}"
        return [split, examples, *scores, str(self.step), count(self.params), count(self.dense_params)]

    def warnings(self) -> list[str]:
        """A line for each damaged step, one if the data has changed, and one if images could not be decoded."""
        lines = selection.warnings(self.damaged, self.data_changed)
        if self.against:
            lines += [f"{self.against.workdir}: {line}" for line in selection.warnings(self.against.damaged)]
        skipped = self.metrics.get("undecodable", 0)
        return lines + ([f"{skipped} of {skipped + self.metrics['examples']:,} images cannot be decoded"] if skipped else [])

    def table(self) -> str:
        """Warnings, a header and the rows as aligned text, and the worst layers where networks were compared."""
        lines = [*map(one_line, self.warnings()), align([self.header(), *self.rows()])]
        return "\n".join(lines + self._worst_layers())

    def _worst_layers(self) -> list[str]:
        if not (self.fidelity and self.against):
            return []
        lines = ["", one_line(f"against {self.against.workdir}, step {self.against.step}:")]
        if self.against.left_out:
            lines.append(one_line(self.against.left_out))
        if rows := self.fidelity.rows_of_layers(_WORST):
            lines.append(align([[one_line(cell) for cell in row] for row in rows]))
        more = len(self.fidelity.layers) - _WORST
        lines += [f"and {more} more, which --json=FILE has"] if more > 0 else []
        unseen = ", ".join(map(one_line, self.fidelity.unseen))
        return lines + ([f"layers not compared: {unseen}"] if unseen else [])

    def tables_of_classes(self) -> str:
        """What was counted of each class as aligned text; of averaged and raw weights one after the other."""
        return "\n".join(f"{title}:\n{classes.table()}" for title, classes in self.counted().items())

    def counted(self) -> dict[str, Classes]:
        """What was counted of each class, by the split and the weights."""
        raw = self.raw_metrics is not None
        both = {f"{self.split}, averaged" if raw else self.split: self.classes, f"{self.split}, raw": self.raw_classes}
        return {title: classes for title, classes in both.items() if classes}

    def record(self) -> dict[str, Any]:
        """The fields, for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        against = fields.pop("against")
        if self.fidelity and against:
            fields["fidelity"] = {**against.record(), **self.fidelity.record()}
        return {name: value.record() if isinstance(value, Classes) else value for name, value in fields.items()}

    def json(self) -> str:
        """A JSON object."""
        return as_json(self.record())

    def __str__(self) -> str:
        return self.table()


def as_json(value: Any) -> str:
    """Indented JSON, each list of numbers on one line."""
    text = json.dumps(value, indent=2)
    # Texts have no line breaks in JSON, and a list of numbers has no texts.
    return re.sub(r'\[[^]["{}]*\]', lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"


class Rows:
    """A table that is printed row by row, as evaluations end; several work directories are its first column.

    Plain aligned text, also on a terminal: a table of rich's is printed when all of its rows are known.
    """

    def __init__(self, workdirs: Sequence[str], say: Callable[[str], None]):
        self._named = len(workdirs) > 1
        self._least, self._widths = max(len(one_line(workdir)) for workdir in workdirs), []
        self._say, self._header = say, []

    def add(self, workdir: str, evaluation: Evaluation) -> None:
        header = ["workdir", *evaluation.header()]
        repeated = header == self._header  # it is printed once, and again where runs have other metrics
        if not repeated:
            self._header, self._widths = header, [self._least] + [0] * (len(header) - 1)
        table = [header, *([one_line(workdir), *row] for row in evaluation.rows())]
        self._widths = [max(map(len, column)) for column in zip(*table, [" " * width for width in self._widths], strict=True)]
        for cells in table[repeated:]:
            self._line(cells)

    def _line(self, cells: list[str]) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)]
        self._say("  ".join(padded if self._named else padded[1:]).rstrip())
