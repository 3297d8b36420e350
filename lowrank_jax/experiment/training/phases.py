"""The networks that a run trains one after the other: with a warm-up a dense one first, then the low-rank one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lowrank_jax.experiment.config.plan import dense_plan
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.training.build import Experiment, build
from lowrank_jax.experiment.training.ranks import Decided


@dataclasses.dataclass(frozen=True)
class Phases:
    """The experiments of a run.

    Attributes:
      low_rank: the one that training ends with.  Before the ranks of a warm-up are decided, one of the same cost.
      dense: the one of the warm-up; None without.
      switch: the last step of the dense one; 0 without, None if that is not known yet.
      decided: the ranks that were chosen from values or costs; None where they are the rules' or not known yet.
    """

    low_rank: Experiment
    dense: Experiment | None = None
    switch: int | None = 0
    decided: Decided | None = None

    def at(self, step: int) -> Experiment:
        """The experiment whose state a step's checkpoint is; that of the switch itself is still dense."""
        if self.dense is not None and (self.switch is None or step <= self.switch):
            return self.dense
        return self.low_rank

    @property
    def all(self) -> list[Experiment]:
        """In the order of time."""
        return [self.low_rank] if self.dense is None else [self.dense, self.low_rank]

    def map(self, change: Callable[[Experiment], Experiment]) -> "Phases":
        """The same with a change to each experiment."""
        dense = None if self.dense is None else change(self.dense)
        return dataclasses.replace(self, low_rank=change(self.low_rank), dense=dense)

    def decide(self, decided: Decided) -> "Phases":
        """The same with the ranks of the low-rank network."""
        known = build(self.low_rank.config, plan=decided.plan)
        known = dataclasses.replace(known, dataset=self.low_rank.dataset, class_weights=self.low_rank.class_weights)
        return dataclasses.replace(self, low_rank=known, switch=decided.step, decided=decided)


def phases_of(
    config: Config, decided: Decided | None = None, source: str = "config", devices: Sequence[Any] | int | None = None
) -> Phases:
    """Builds the experiments of a run.

    Args:
      config: of the run.
      decided: its ranks, where they are not the rules'.
      source: what to call the config in messages.
      devices: see `build`.

    Raises:
      ConfigError: the parts do not fit together.
    """
    low_rank = build(config, source, devices, decided and decided.plan)
    if not config.starts_dense:
        return Phases(low_rank, decided=decided)
    switch = decided.step if decided else config.dense_steps
    return Phases(low_rank, build(config, source, devices, dense_plan(config)), switch, decided)
