"""What a network may cost: budgets as they are asked for, and checked."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Literal

from lowrank_jax.checks import count, is_number
from lowrank_jax.planning.chips import Chip
from lowrank_jax.text import did_you_mean, shown

OBJECTIVES = ("tolerance", "correlation", "risk", "divergence", "uniform")
MIN_SCALE_OF_SECONDS, MIN_RANK_OF_SECONDS = 0.05, 2
LEAST_OF_SECONDS = f"{MIN_SCALE_OF_SECONDS} of full rank and {MIN_RANK_OF_SECONDS}"


Kind = Literal["params", "macs", "bytes", "seconds"]


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `allocate` that are not the network's."""

    chip: Chip | None = None
    batch: int | None = None
    itemsize: int = 4
    rest: float = 0.0
    objective: str = "tolerance"
    min_scale: float | None = None
    multiple_of: int = 1

    def check(self, given: Mapping[Kind, float | int]) -> None:
        if not 1 <= len(given) <= 2:
            raise ValueError("give one budget, or two: params, macs, bytes or seconds")
        for kind, value in given.items():
            _check_budget(kind, value)
        if {"bytes", "seconds"} <= given.keys():  # itemsize would be that of parameters, and of activations
            raise ValueError("bytes and seconds cannot be budgets at once; give params in the place of bytes")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {shown(self.objective)}{did_you_mean(self.objective, OBJECTIVES)}")
        if self.min_scale is not None and not (is_number(self.min_scale) and 0 <= self.min_scale <= 1):
            raise ValueError(f"min_scale {shown(self.min_scale)} must be from 0 to 1")
        if "seconds" in given and (self.chip is None or self.batch is None):
            raise ValueError("a budget of seconds needs chip, one of lowrank_jax.chips.CHIPS, and batch, the examples on it")
        if self.chip is not None and not isinstance(self.chip, Chip):
            raise ValueError(f"chip must be one of lowrank_jax.chips.CHIPS, not {shown(self.chip)}")
        counts = {"multiple_of": self.multiple_of, "itemsize": self.itemsize, "batch": 1 if self.batch is None else self.batch}
        for name, value in counts.items():
            if complaint := count(value):
                raise ValueError(f"{name} {shown(value)} {complaint}")
        if not is_number(self.rest) or self.rest < 0:
            raise ValueError(f"rest {shown(self.rest)} must be a number of seconds, at least 0")

    def smallest_rank(self, full_rank: int, kinds: Collection[Kind]) -> int:
        """By `min_scale`, or by default: at rank 1 a layer may be cheap in seconds, and worthless."""
        default = self.min_scale is None and "seconds" in kinds
        scale = MIN_SCALE_OF_SECONDS if default else self.min_scale or 0.0
        return max(MIN_RANK_OF_SECONDS if default else 1, math.ceil(scale * full_rank - 1e-9))


def _check_budget(kind: str, value: float | int) -> None:
    if isinstance(value, float) and 0 < value <= 1:
        return
    if kind != "seconds" and type(value) is int and value >= 1:
        if complaint := count(value):
            raise ValueError(f"{kind}={shown(value)} {complaint}")
        return
    what = "a fraction above 0 and up to 1" + ("" if kind == "seconds" else ", such as 0.5, or a whole number")
    raise ValueError(f"{kind}={shown(value)} must be {what}")
