"""How well each class is recognised, and what it is taken for."""

import dataclasses
from typing import Any

import numpy as np

from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.text import align, one_line

_MOST = 10_000  # classes whose pairs are counted: the matrix takes 400 MB on every device
_CHOOSING = ("softmax", "sigmoid")  # objectives whose largest output is the class
_SHOWN, _WORST, _PAIRS = 40, 20, 10  # rows of a table; of more classes those of the lowest top-1, and pairs


def names_of(dataset: Dataset) -> tuple[str, ...]:
    """The names of a data set's classes; their numbers where it has none."""
    return dataset.class_names or tuple(map(str, range(dataset.num_classes or 0)))


def number_to_count(config: Config, dataset: Dataset) -> int:
    """How many classes to count the predictions of; 0 where they cannot be."""
    return 0 if why_not(config, dataset) else dataset.num_classes or 0


def check(config: Config, dataset: Dataset) -> None:
    """Raises UserError if the predictions of classes cannot be counted."""
    if reason := why_not(config, dataset):
        raise UserError(f"{dataset.name}: {reason}")


def why_not(config: Config, dataset: Dataset) -> str | None:
    """Why the predictions of classes cannot be counted; None if they can."""
    if reason := chooses_none(config, dataset):
        return f"{reason}, so classes cannot be counted"
    if (dataset.num_classes or 0) > _MOST:
        return f"a confusion matrix of {dataset.num_classes:,} classes is too large; at most {_MOST:,} are counted"
    return None


def chooses_none(config: Config, dataset: Dataset) -> str | None:
    """Why a run's network does not choose one class of an example; None if it does."""
    if dataset.num_classes is None or dataset.label.shape:
        return "the label of an example is not one class"
    objective = config.objective.name
    return None if objective in _CHOOSING else f"objective.name={objective} need not choose one class"


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the examples of each class were taken for, over a whole split.

    Attributes:
      names: of the classes, in the order of their labels.
      counts: the examples of each class, int32 `[classes]`.
      confusion: how many of them were taken for each class, int32 `[classes, classes]`, as `[true, predicted]`.  An example
        whose logits are not all numbers is in no column.
    """

    names: tuple[str, ...]
    counts: np.ndarray
    confusion: np.ndarray

    @property
    def top1(self) -> np.ndarray:
        """The share of each class that was recognised, float64 `[classes]`; NaN where it has no examples."""
        return np.divide(self.confusion.diagonal(), self.counts, out=np.full(len(self.counts), np.nan), where=self.counts > 0)

    def confused(self, most: int = _PAIRS) -> list[tuple[int, int, int]]:
        """The most frequent mistakes, as the true class, the predicted one and how often."""
        mistakes = self.confusion * (1 - np.eye(len(self.counts), dtype=self.confusion.dtype))
        order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
        pairs = [(int(place // len(self.counts)), int(place % len(self.counts))) for place in order]
        return [(true, taken, int(mistakes[true, taken])) for true, taken in pairs if mistakes[true, taken]]

    def table(self) -> str:
        """A row for each class; of very many classes the worst, and the most frequent mistakes."""
        if len(self.names) <= _SHOWN:
            return align([_HEADER, *map(self._row, range(len(self.names)))])
        seen = np.flatnonzero(self.counts)
        worst = seen[np.argsort(self.top1[seen], kind="stable")][:_WORST]
        rows = [["class", "taken for", "examples"]]
        rows += [[self._name(true), self._name(taken), f"{often:,}"] for true, taken, often in self.confused()]
        lines = [f"the {len(worst)} worst of {len(self.names):,} classes:", align([_HEADER, *map(self._row, worst)])]
        return "\n".join(lines + (["the most frequent mistakes:", align(rows)] if len(rows) > 1 else []))

    def _row(self, number: int) -> list[str]:
        mistakes = np.where(np.arange(len(self.names)) == number, 0, self.confusion[number])
        taken = int(mistakes.argmax())
        mistake = f"{self._name(taken)} ({mistakes[taken]:,})" if mistakes[taken] else ""
        top1 = f"{self.top1[number]:.4f}" if self.counts[number] else ""
        return [self._name(number), f"{self.counts[number]:,}", top1, mistake]

    def _name(self, number: int) -> str:
        return one_line(self.names[number])

    def record(self) -> dict[str, Any]:
        """For JSON; the top-1 of a class without examples is None."""
        top1 = [None if np.isnan(value) else float(value) for value in self.top1]
        counts, confusion = self.counts.tolist(), self.confusion.tolist()
        return {"names": list(self.names), "counts": counts, "top1": top1, "confusion": confusion}


_HEADER = ["class", "examples", "top1", "most often taken for"]
