"""Runs a sweep from its first trial to its last, with any engine."""

from collections import Counter
from collections.abc import Callable, Sequence

from etils import epath

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.sweep.trials import Outcome, Sweep, Trial, check_workdirs, record
from lowrank_jax.text import one_line

Engine = Callable[[Sequence[Trial]], dict[str, Outcome]]


def launch(sweep: Sweep, folder: epath.PathLike, engine: Engine, *, command: str) -> dict[str, Outcome]:
    """Runs the first trials, chooses the tuned values, then runs the later trials.

    Args:
      sweep: the trials.
      folder: of their work directories; sweep.json there tells `lowrank report` which trials were asked for.
      engine: runs trials and returns their outcomes by name.
      command: the command line, to record in sweep.json.

    Raises:
      WorkdirError: a work directory belongs to another experiment.
      DataError: the data is missing.  Both are raised before anything starts.
    """
    check_workdirs([*sweep.first, *sweep.later])
    _check_data(sweep.first)
    record(folder, sweep, sweep.first, command)
    outcomes = engine(sweep.first)
    if sweep.later and not interrupted(outcomes):
        chosen = sweep.chosen()
        record(folder, sweep, chosen, command)
        outcomes |= engine(chosen)
    return outcomes


def _check_data(trials: Sequence[Trial]) -> None:
    """Loads each data set once: missing data is reported now, and data prepared on first use is prepared by one process."""
    seen = {}
    for trial in trials:
        dataset = trial.config.dataset
        seen[dataset.name, dataset.kwargs, dataset.data_dir] = trial.config
    for config in seen.values():
        datasets.load(config.description, config.dataset.eval_split, config.dataset.data_dir)


def interrupted(outcomes: dict[str, Outcome]) -> bool:
    return any(outcome.status == "interrupted" for outcome in outcomes.values())


def summary(outcomes: dict[str, Outcome]) -> str:
    """Counts of the outcomes, and a line for every trial that failed or diverged."""
    counts = Counter(outcome.status for outcome in outcomes.values())
    lines = [", ".join(f"{number} {status}" for status, number in counts.items())]
    lines += [one_line(f"{outcome.status}: {name}: {outcome.reason}") for name, outcome in outcomes.items() if _bad(outcome)]
    return "\n".join(lines)


def succeeded(outcomes: dict[str, Outcome]) -> bool:
    return not any(map(_bad, outcomes.values()))


def _bad(outcome: Outcome) -> bool:
    return outcome.status in ("failed", "diverged")
