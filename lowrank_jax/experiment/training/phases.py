"""The networks that a run trains one after the other: a dense or a self-guided one may come before the low-rank one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lowrank_jax.experiment.config.plan import dense_plan
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.training.build import Experiment, build
from lowrank_jax.experiment.training.ranks import Decided
from lowrank_jax.planning.plans import Plan


@dataclasses.dataclass(frozen=True)
class Phases:
    """The experiments of a run.

    Attributes:
      last: the one that training ends with.  Before the ranks of a warm-up are decided, one of the same cost.
      first: the one before it: of a dense warm-up, or of self-guided training; None without.
      switch: the last step of the first one; 0 without, None if that is not known yet.
      decided: the ranks that were chosen from values or costs; None where they are the rules' or not known yet.
    """

    last: Experiment
    first: Experiment | None = None
    switch: int | None = 0
    decided: Decided | None = None

    def at(self, step: int) -> Experiment:
        """The experiment whose state a step's checkpoint is; that of the switch itself is still the first one's."""
        if self.first is not None and (self.switch is None or step <= self.switch):
            return self.first
        return self.last

    def ends(self, step: int) -> bool:
        """Whether the first phase ends with a step."""
        return self.first is not None and step == self.switch

    @property
    def all(self) -> list[Experiment]:
        """In the order of time."""
        return [self.last] if self.first is None else [self.first, self.last]

    @property
    def guided(self) -> bool:
        """Whether the first one is self-guided."""
        return self.first is not None and self.first.guided_steps > 0

    @property
    def dense_steps(self) -> int:
        """The last step of a dense warm-up that has ended; 0 without."""
        return 0 if self.guided else self.switch or 0

    def map(self, change: Callable[[Experiment], Experiment]) -> "Phases":
        """The same with a change to each experiment."""
        first = None if self.first is None else change(self.first)
        return dataclasses.replace(self, last=change(self.last), first=first)

    def decide(self, decided: Decided) -> "Phases":
        """The same with the ranks of the low-rank network, with guides and without."""
        found = self.last.dataset, self.last.class_weights
        known = _built(decided.plan, self.last.config, *found)
        if self.first is None or not self.guided:
            return dataclasses.replace(self, last=known, switch=decided.step, decided=decided)
        first = _built(decided.plan, self.last.config, *found, guided_steps=self.first.guided_steps)
        return dataclasses.replace(self, last=known, first=first, decided=decided)


def _built(
    plan: Plan, config: Config, dataset: Dataset, class_weights: tuple[float, ...], *, guided_steps: int = 0
) -> Experiment:
    known = build(config, plan=plan, guided_steps=guided_steps)
    return dataclasses.replace(known, dataset=dataset, class_weights=class_weights)


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
    plan = decided and decided.plan
    last = build(config, source, devices, plan)
    if length := config.guided_steps:
        return Phases(last, build(config, source, devices, plan, guided_steps=length), length, decided)
    if not config.starts_dense:
        return Phases(last, decided=decided)
    switch = decided.step if decided else config.dense_steps
    return Phases(last, build(config, source, devices, dense_plan(config)), switch, decided)
