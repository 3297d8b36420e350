"""A sweep from its first trial to its last, whatever engine runs them."""

from collections import Counter
from collections.abc import Callable, Sequence

from etils import epath

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.sweep.trials import Outcome, Sweep, Trial, check_workdirs, record

Engine = Callable[[Sequence[Trial]], dict[str, Outcome]]


def launch(sweep: Sweep, folder: epath.PathLike, engine: Engine, *, command: str) -> dict[str, Outcome]:
    """Runs the first trials, chooses the tuned values, runs the later ones.

    Args:
      sweep: the trials.
      folder: that holds their work directories; sweep.json there tells `lowrank report` what was asked for.
      engine: runs trials and returns their outcomes by name.
      command: to note in sweep.json.

    Raises:
      WorkdirError, DataError: before anything is started; a folder belongs to another experiment, or there is no data.
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
    """Reads each data set once: what is missing is told now, and what is made on first use is made by one process."""
    seen = {}
    for trial in trials:
        dataset = trial.config.dataset
        seen[dataset.name, dataset.kwargs, dataset.data_dir] = trial.config
    for config in seen.values():
        datasets.load(config.description, config.dataset.eval_split, config.dataset.data_dir)


def interrupted(outcomes: dict[str, Outcome]) -> bool:
    return any(outcome.status == "interrupted" for outcome in outcomes.values())


def summary(outcomes: dict[str, Outcome]) -> str:
    """A count of each outcome, and a line for every trial that did not succeed."""
    counts = Counter(outcome.status for outcome in outcomes.values())
    lines = [", ".join(f"{number} {status}" for status, number in counts.items())]
    lines += [f"{outcome.status}: {name}: {outcome.reason}" for name, outcome in outcomes.items() if _bad(outcome)]
    return "\n".join(lines)


def succeeded(outcomes: dict[str, Outcome]) -> bool:
    return not any(map(_bad, outcomes.values()))


def _bad(outcome: Outcome) -> bool:
    return outcome.status in ("failed", "diverged")
