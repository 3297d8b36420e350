"""Ends poor trials early by asynchronous successive halving (ASHA), with Ray Tune's scheduler."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.sweep.trials import Trial
from lowrank_jax.experiment.workdir.workdir import Workdir

if TYPE_CHECKING:
    from ray.tune.schedulers import ASHAScheduler


@dataclasses.dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving (Li et al., 2020): ends the trials that are behind others at the same step.

    Attributes:
      grace: no trial is ended before this step, at which every trial must have the network that its training ends with.
      reduction: keep the best 1/reduction of the trials at each rung; rungs are at grace, grace * reduction, and so on.
    """

    grace: int
    reduction: float = 4

    def scheduler(self, trials: Sequence[Trial]) -> "ASHAScheduler":
        """Tune's scheduler for these trials, by their own metric.  Raises ConfigError if the settings do not suit them."""
        from ray.tune.schedulers import ASHAScheduler

        best = trials[0].config.best
        longest = max(trial.config.total_steps for trial in trials)
        problems = []
        if not 1 <= self.grace <= longest:
            problems.append(f"grace: {self.grace}; must be from 1 to {longest}, the steps of the longest trial")
        else:
            problems += self._too_early(trials)
        if not self.reduction > 1:
            problems.append(f"reduction: {self.reduction:g}; must be more than 1")
        if problems:
            raise configs.ConfigError("--asha", problems)
        # A trial at max_t ends anyway.  stop_last_trials would also compare a trial with fewer evaluations than rungs at the
        # rungs that it skipped.
        return ASHAScheduler(
            time_attr="step",
            metric=best.metric,
            mode="min" if best.lower else "max",
            max_t=longest,
            grace_period=self.grace,
            reduction_factor=self.reduction,
            stop_last_trials=False,
        )

    def _too_early(self, trials: Sequence[Trial]) -> list[str]:
        """What is wrong if trials are judged while some of them still train another network than the one they end with."""
        early = {trial.name: switch for trial in trials if (switch := trial.config.latest_switch) >= self.grace}
        if not early:
            return []
        name = max(early, key=early.__getitem__)
        more = f" (and {len(early) - 1} more)" if len(early) > 1 else ""
        return [
            f"grace: {self.grace}; {name}{more} may be in its dense warm-up or self-guided phase until step {early[name]}, and"
            f" a rung compares the networks that training ends with; must be more than {early[name]} steps"
        ]


def replay(scheduler: "ASHAScheduler", trials: Sequence[Trial]) -> None:
    """Tells the scheduler the evaluations of trials from earlier calls, as if all had been one call."""
    for trial in trials:
        stand_in: Any = StandIn(trial.name)
        scheduler.on_trial_add(None, stand_in)  # pyright: ignore[reportArgumentType]
        metric = trial.config.best.metric
        for step, value in Workdir(trial.workdir).metrics.evaluations(metric):
            scheduler.on_trial_result(None, stand_in, {"step": step, metric: value})  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """The part of a Tune trial that the scheduler uses."""

    trial_id: str
