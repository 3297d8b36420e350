"""Runs grouped into arms, each arm at its best tuning, and comparisons between arms."""

import collections
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.best import Best
from lowrank_jax.experiment.config.schema import BUDGETS
from lowrank_jax.experiment.report.stored_runs import SIZES, Found, StoredRun
from lowrank_jax.experiment.sweep import names
from lowrank_jax.experiment.sweep.trials import merit
from lowrank_jax.text import did_you_mean

CONFIDENCE = 0.95
_SIZES = (*SIZES, *BUDGETS)
_WAY = "lowrank.budget"  # on an arm's line, where some runs have a budget of another kind than others, or none
_ENDS = ("done", "diverged", "failed", "stopped")
Values = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Interval:
    """The mean of n values with half the width of Student's t interval; NaN for a single value."""

    mean: float
    half: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    @classmethod
    def of(cls, values: Iterable[float]) -> "Interval":
        values = list(values)
        n = len(values)
        if n == 1 or not all(map(math.isfinite, values)):
            return cls(sum(values) / n, math.nan, n)
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
        return cls(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n), n)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One tuning of an arm, with its metric's mean on the held-out split over `seeds`, or why it cannot be chosen."""

    values: Values
    seeds: tuple[int, ...]
    valid: float | None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Arm:
    """Finished runs that differ only in the seed.

    Attributes:
      line: the method and every other varied setting, except size, tuning and seed; where sizes are given in several ways,
        also the kind of budget.
      size: the scale, the rank or the budget; empty for a dense network.
      tuning: the values of the tuned keys.
      runs: by seed.
      missing: number of further runs that did not finish.
      candidates: the tunings to choose from; empty if nothing was chosen.
    """

    line: Values
    size: Values
    tuning: Values
    runs: dict[int, StoredRun]
    missing: int = 0
    candidates: tuple[Candidate, ...] = ()

    @property
    def method(self) -> str:
        return dict(self.line).get("lowrank.method", "")

    @property
    def told_apart_by(self) -> dict[str, Any]:
        """What another arm may have otherwise: a setting that it lacks here is None."""
        return dict(self.line) | dict(self.size)

    @property
    def label(self) -> str:
        """The line as text, for example "spectral, frobenius_decay 0.001"."""
        method = "dense" if self.method == "none" else self.method
        return ", ".join([method, *(f"{short(key)} {text(value)}" for key, value in self.line if key != "lowrank.method")])

    def interval(self, name: str) -> Interval:
        return Interval.of(run.figure(name) for run in self.runs.values())

    @property
    def at_edge(self) -> bool:
        """Whether the chosen tuning is the lowest or highest value tried, so that a better one may lie outside the range."""
        for key, value in self.tuning:
            tried = {dict(candidate.values).get(key) for candidate in self.candidates}
            numbers = [number for number in tried if isinstance(number, int | float)]
            if len(numbers) > 1 and value in (min(numbers), max(numbers)):
                return True
        return False


def short(key: str) -> str:
    """What a setting is called beside its value: as in a sweep, where that is no other's; "model" for "model.name"."""
    section, _, last = key.rpartition(".")
    if last == "name":
        return section
    return key if last in _shared() else names.short(key)


@functools.cache
def _shared() -> frozenset[str]:
    """The last parts that several keys of a config have."""
    lasts = collections.Counter(key.rpartition(".")[2] for key in configs.legal_keys())
    return frozenset(last for last, number in lasts.items() if number > 1)


def text(value: Any) -> str:
    """A setting in a table: the shortest form that keeps its value."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def same(value: Any, given: str) -> bool:
    """Whether a setting equals the value that the user typed."""
    try:
        return float(value) == float(given)
    except (TypeError, ValueError):
        return str(value) == given


def into_arms(found: Found, tune: Sequence[str]) -> list[Arm]:
    """Groups finished runs into arms; where a key of `tune` was varied, each arm has its best value on the held-out split.

    Without a held-out split nothing is chosen: every value is an arm of its own.
    """
    tuned = [key for key in tune if key in found.varied]
    other = [key for key in found.varied if key not in (*_SIZES, *tuned, "seed", "lowrank.method")]
    cells: dict[tuple[Values, Values], dict[Values, dict[int, StoredRun]]] = {}
    runs = [run for run in found.runs if run.settings and run.status != "repeated"]
    several = len({_kinds(run) for run in runs if run.settings["lowrank.method"] != "none"}) > 1
    for run in runs:
        line, size, tuning = _values(run, ["lowrank.method", *other]), _values(run, _SIZES), _values(run, tuned)
        if several and _kinds(run):
            line = (*line, (_WAY, _kinds(run)))
        if run.seed in cells.get((line, size), {}).get(tuning, {}):  # they differ in what looks alike, such as True and 1
            line = (*line, ("run", run.name))
        cells.setdefault((line, size), {}).setdefault(tuning, {})[run.seed] = run
    arms = [arm for (line, size), tunings in cells.items() for arm in _arms(line, size, tunings, found.best)]
    return sorted(arms, key=lambda arm: (arm.method != "none", str(arm.line[1:]), _order(arm)))


def _kinds(run: StoredRun) -> str:
    """What the run's budget is in; empty without one."""
    return " and ".join(key.rpartition(".")[2] for key in BUDGETS if run.settings.get(key) is not None)


def _arms(line: Values, size: Values, tunings: dict[Values, dict[int, StoredRun]], best: Best) -> list[Arm]:
    """The arm at its best tuning if all runs have a held-out split; otherwise one arm per tuning."""
    finished = [run for runs in tunings.values() for run in runs.values() if run.done]
    if not finished:
        return []
    if list(tunings) != [()] and all(run.result.get("valid") for run in finished):
        return [_chosen(line, size, tunings, best)]
    return [
        Arm((*line, *values), size, (), done, len(runs) - len(done))
        for values, runs in tunings.items()
        if (done := _done(runs))
    ]


def _done(runs: dict[int, StoredRun]) -> dict[int, StoredRun]:
    return {seed: run for seed, run in runs.items() if run.done}


def _order(arm: Arm) -> Any:
    sizes = tuple(value for _, value in arm.size)
    return (sizes, arm.method)


def _values(run: StoredRun, keys: Sequence[str]) -> Values:
    return tuple((key, _hashable(run.settings[key])) for key in keys if run.settings.get(key) is not None)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else str(value) if isinstance(value, dict) else value


def _chosen(line: Values, size: Values, tunings: dict[Values, dict[int, StoredRun]], best: Best) -> Arm:
    """The arm at the tuning with the highest `merit`, over the seeds that every tuning with an ended run has ended.

    A tuning that diverged, failed or was stopped at one of these seeds is only chosen if there is no other.
    """
    ended = [{seed for seed, run in runs.items() if run.status in _ENDS} for runs in tunings.values()]
    seeds = set.intersection(*filter(None, ended))
    finished = {values: done for values, runs in tunings.items() if (done := _done(runs))}
    whole = {values: done for values, done in finished.items() if seeds <= set(done)} or finished
    shared = set.intersection(*map(set, whole.values()))
    common = sorted(shared & seeds or shared)
    scores = {
        values: merit([done[seed].result for seed in common or done], [value for _, value in values], best)
        for values, done in whole.items()
    }
    chosen = max(scores, key=lambda values: scores[values])
    means = {values: best.score(score) for values, (score, *_) in scores.items() if math.isfinite(score)}
    candidates = tuple(_candidate(values, tunings[values], common, means.get(values)) for values in sorted(tunings, key=str))
    return Arm(line, size, chosen, finished[chosen], len(tunings[chosen]) - len(finished[chosen]), candidates)


def _candidate(values: Values, runs: dict[int, StoredRun], seeds: list[int], mean: float | None) -> Candidate:
    if mean is not None:
        return Candidate(values, tuple(seeds), mean)
    ends = dict.fromkeys(run.status for run in runs.values() if not run.done)
    return Candidate(values, tuple(seeds), None, ", ".join(ends) or "counts nobody")


@dataclasses.dataclass(frozen=True)
class Difference:
    """`arm` minus `rival`, paired by seed."""

    arm: Arm
    rival: Arm
    interval: Interval


def paired(arms: Sequence[Arm], rival: tuple[str, str], name: str) -> list[Difference]:
    """Every low-rank arm minus its rival: the arm with the rival's value of a key that is equal otherwise, over common seeds.

    Args:
      arms: all arms.
      rival: key and value as text, for example ("lowrank.method", "spectral") or ("lowrank.scale", "0.1").
      name: of the figure to compare; see `StoredRun.figure`.
    """
    differences = []
    for arm in arms:
        twin = next((other for other in arms if _differ_in(arm, other, rival)), None)
        seeds = sorted(set(arm.runs) & set(twin.runs)) if twin else []
        if twin is None or not seeds:
            continue
        values = [arm.runs[seed].figure(name) - twin.runs[seed].figure(name) for seed in seeds]
        differences.append(Difference(arm, twin, Interval.of(values)))
    return differences


def _differ_in(arm: Arm, other: Arm, rival: tuple[str, str]) -> bool:
    """Whether `other` is the rival and differs from `arm` in nothing else."""
    key, value = rival
    ours, theirs = arm.told_apart_by, other.told_apart_by
    own, its = ours.pop(key, None), theirs.pop(key, None)
    return ours == theirs and bool(arm.size and other.size) and own != its and same(its, value)


def no_rival(key: str, arms: Sequence[Arm], found: Found) -> str:
    """Why no arm can be the others' rival by its value of a setting; "" if one can."""
    if any(key in arm.told_apart_by for arm in arms) or not arms:
        return ""
    legal = sorted({name for run in found.runs for name in run.settings})
    if key not in legal:
        return f"{key}: unknown key{did_you_mean(key, legal)}"
    if key == "seed":
        return "seed: runs that differ in their seed are one arm"
    if any(key in dict(arm.tuning) for arm in arms):
        return f"{key}: every arm has the value of it that is best on the held-out split"
    if key in found.varied:
        return f"{key}: it is not set in any finished run with factors"
    values = [run.settings[key] for run in found.runs if key in run.settings]
    return f"{key}: it is {text(values[0])} in all runs, so none of them is a rival by it"
