"""The metric by which checkpoints, trials and learning rates are chosen."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

LOSS = "loss"

_SHOWN = {"top1": "top-1", "top5": "top-5"}


@dataclasses.dataclass(frozen=True)
class Best:
    """A metric, and which way is better.

    Attributes:
      metric: its name; "loss" is one.
      lower: whether lower values are better.
    """

    metric: str = "top1"
    lower: bool = False

    @classmethod
    def read(cls, text: str) -> "Best":
        """From a config: "top1", of which larger values are better, or "-loss", of which lower ones are.

        Raises:
          ValueError: it is neither.
        """
        lower, metric = text.startswith("-"), text.removeprefix("-")
        if not re.fullmatch(NAME, metric):
            raise ValueError('must be the name of a metric, or "-" and a name if lower is better')
        if metric == LOSS and not lower:
            raise ValueError('of a loss lower is better: "-loss"')
        return cls(metric, lower)

    @classmethod
    def usual(cls, objective: str, metrics: Sequence[str]) -> "Best":
        """Where nothing is set: of `softmax` its first metric, of others the loss."""
        first = metric_name(metrics[0]) if metrics else LOSS
        return cls(first) if objective == "softmax" and first != LOSS else cls(LOSS, lower=True)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Best":
        """From the settings of a stored run, by dotted key.

        Raises:
          ValueError: `eval.best` is no such text.
        """
        given = settings.get("eval.best")
        return cls.read(given) if given else cls.usual(settings.get("objective.name", "softmax"), settings["objective.metrics"])

    def measured_as(self, objective: str, loss: str) -> str:
        """What results must share to be compared: the metric, and of the loss, whose it is."""
        if self.metric != LOSS:
            return str(self)
        return f"{self} of {loss if objective == 'softmax' else objective}"

    def __str__(self) -> str:
        return f"-{self.metric}" if self.lower else self.metric

    def score(self, value: float) -> float:
        """The value, or its negative: larger is better."""
        return -value if self.lower else value

    @property
    def is_fraction(self) -> bool:
        """Whether values are known to lie between 0 and 1."""
        return self.metric in _SHOWN

    @property
    def title(self) -> str:
        """What tables call the metric."""
        return _SHOWN.get(self.metric, self.metric)


def measured(metrics: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of what was measured, without their prefix: the metrics, then the loss."""
    names = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    return [*(name for name in names if name not in TAKEN), LOSS]


TAKEN = (
    LOSS, "count", "examples", "undecodable", "grad_norm", "lr", "images_per_second", "vote",
    "step", "training_iteration", "status", "reason", "done",
)  # fmt: skip
"""What else the logs and results hold under such names."""

NAME = r"[A-Za-z_][\w.@-]*"
"""What a metric may be called: it is a key of logs and a column of tables."""


def metric_name(name: str) -> str:
    """What a metric is called in logs and tables: "package.module:calibration" is "calibration"."""
    return name.rpartition(":")[2]
