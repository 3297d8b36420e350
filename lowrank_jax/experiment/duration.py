"""Lengths of training."""

import dataclasses
import math
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training: "500", "500 steps", "2 epochs" or "1e6 examples"."""

    amount: float
    unit: str

    @classmethod
    def read(cls, value: Any) -> "Duration":
        """Reads a duration from text or a number of steps.

        Raises:
          ValueError: it is not a duration.
        """
        try:
            text = str(value).strip() if isinstance(value, str | int | float) else ""
            match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(step|epoch|example)?s?", text)
            amount = float(match[1])  # type: ignore[index]
        except (TypeError, ValueError):  # of a number of thousands of digits, too
            match, amount = None, math.inf
        if match is None or not amount < 1e18:
            raise ValueError('a duration such as "500 steps" or "2 epochs"')
        return cls(amount, match[2] or "step")

    def steps(self, batch_size: int, epoch_size: int) -> int:
        """The duration in whole steps."""
        examples = {"step": batch_size, "epoch": epoch_size, "example": 1}[self.unit]
        return math.floor(self.amount * examples / batch_size + 0.5)

    def __str__(self) -> str:
        whole = float(self.amount).is_integer()
        return f"{int(self.amount) if whole else self.amount!r} {self.unit}s"
