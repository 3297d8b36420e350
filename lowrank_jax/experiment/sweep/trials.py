"""The trials of a sweep, from its text to their configs, commands and outcomes."""

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from etils import epath
from ml_collections import ConfigDict

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.best import Best
from lowrank_jax.experiment.config.plan import forecast
from lowrank_jax.experiment.config.schema import BUDGETS, Config
from lowrank_jax.experiment.sweep import grammar
from lowrank_jax.experiment.sweep.names import folder_names
from lowrank_jax.experiment.workdir import files, stored_values
from lowrank_jax.experiment.workdir.identity import digest_of, flatten
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from lowrank_jax.text import align, count, did_you_mean

# Settings without effect where no kernel is factored: a dense arm appears once, whatever their values.
_OF_FACTORS = ("lowrank.", "optim.frobenius_decay", "optim.nuclear_decay")

_NAME = re.compile(r"(?!\.\.?$)[\w.,=+-]+")  # of a trial's folder, as `folder_names` makes it

# Keys that distinguish the arms of a comparison, and the seed, over which their spread is taken.
_NOT_TUNED = ("seed", "lowrank.method", "lowrank.scale", "lowrank.rank", *BUDGETS)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      name: of its folder, made of the swept values.
      values: the swept values as text, by key.
      config: the whole config, parsed.
      workdir: of the run.
      command: the arguments of `lowrank` that run it.
    """

    name: str
    values: dict[str, str]
    config: Config
    workdir: str
    command: tuple[str, ...]

    def result(self) -> dict[str, Any] | None:
        """The contents of result.json; None if the run has not finished, or what is there is not its result."""
        return _read(self, "result.json", self._checked)

    def _checked(self, result: dict[str, Any]) -> dict[str, Any]:
        stored_values.check_result(result, self.config.best.metric)
        own = digest_of(self.config)
        if result.get("config_digest", own) != own:  # earlier versions wrote none
            raise ValueError("it belongs to other settings")
        if self.config.dataset.valid_split is not None and result.get("valid") is None:
            raise ValueError("it has no valid, by which values are tuned")
        return result


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended, as reported by an engine.

    Attributes:
      status: `done`; `diverged`; `failed` for any other reason; `stopped` on purpose by a scheduler; `interrupted`: the same
        command resumes it.
      reason: as text; may be empty.
    """

    status: Literal["done", "diverged", "failed", "stopped", "interrupted"]
    reason: str = ""


def known_outcome(trial: Trial) -> "Outcome | None":
    """How the trial ended earlier; None if it is to be run or resumed."""
    if trial.result() is not None:
        return Outcome("done")
    if stopped := _read(trial, "stopped.json", stored_values.stop):
        return Outcome("stopped", stopped[1])
    status, reason = _read(trial, "failure.json", stored_values.failure) or ("", "")
    return Outcome("diverged", reason) if status == "diverged" else None


_T = TypeVar("_T")


def _read(trial: Trial, name: str, meaning: Callable[[dict[str, Any]], _T]) -> _T | None:
    """The meaning of a file of a trial; None if it is missing or damaged, since the trial writes it again when it is run."""
    try:
        found = Workdir(trial.workdir).read_json(name)
        return None if found is None else meaning(found)
    except (WorkdirError, ValueError):
        return None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All trials of a sweep, in the order in which to start them.

    Attributes:
      first: the trials that can start at once.
      later: the trials that wait until the first ones show which tuned values are best; empty without `tune(...)`.
      tuned: the tuned keys.
    """

    first: tuple[Trial, ...]
    later: tuple[Trial, ...]
    tuned: tuple[str, ...]

    def chosen(self) -> list[Trial]:
        """The later trials at the tuned values that were best in the first ones, by `merit`."""
        results = [(trial, trial.result()) for trial in self.first]
        finished = [(merit([found], self._tuning(trial), trial.config.best), trial) for trial, found in results if found]
        best = {self._arm(trial): trial for _, trial in sorted(finished, key=lambda pair: pair[0])}
        return [trial for trial in self.later if _same_tuning(trial, best.get(self._arm(trial)), self.tuned)]

    def _tuning(self, trial: Trial) -> list[Any]:
        settings = flatten(configs.to_dict(trial.config))
        return [settings.get(key) for key in self.tuned]

    def _arm(self, trial: Trial) -> tuple[tuple[str, str], ...]:
        return tuple((key, text) for key, text in trial.values.items() if key not in (*self.tuned, "seed"))

    def table(self) -> str:
        """The trials as aligned text."""
        keys = list(dict.fromkeys(key for trial in (*self.first, *self.later) for key in trial.values))
        rows = [["trial", *keys, "params", "MACs", "steps"]]
        for trial in self.first:
            rows.append([trial.name, *(trial.values.get(key, "-") for key in keys), *_size(trial.config)])
        lines = [align(rows), f"{len(self.first)} trials"]
        if self.later:
            rest = len({(self._arm(trial), trial.values["seed"]) for trial in self.later})
            lines.append(f"and {rest} more: the other seeds at the best {', '.join(self.tuned)} of each arm")
        later = dict.fromkeys((trial.config.starts_dense, forecast(trial.config)) for trial in self.first)
        lines += [f"Params and MACs{' after a dense warm-up' if dense else ''}: {open_}." for dense, open_ in later if open_]
        return "\n".join(lines)


def expand(source: str, overrides: Sequence[tuple[str, str]], text: str, workdir: str) -> Sweep:
    """The trials of a sweep.

    Args:
      source: the config file.
      overrides: common to all trials, `(key, value)` as text.
      text: of the sweep; see `grammar`.
      workdir: the folder of the trials' work directories.

    Raises:
      ConfigError: all problems of the sweep's text and of the trials' configs; nothing has started.
    """
    try:
        axes = grammar.parse(text)
    except ValueError as error:
        raise configs.ConfigError("--sweep", str(error).splitlines()) from None
    _check_keys(axes, overrides)
    parsed, problems = _Parser(source, overrides), {}
    distinct = list({tuple(_relevant(assignment, parsed.method).items()): None for assignment in axes.assignments()})
    names = folder_names([dict(items) for items in distinct])
    trials = []
    for name, items in zip(names, distinct, strict=True):
        values = dict(items)
        try:
            config = parsed(values)
        except configs.ConfigError as error:
            problems.update({problem: name for problem in error.problems if problem not in problems})
            continue
        folder = str(epath.Path(workdir) / name)
        flags = [f"--config.{key}={value}" for key, value in (*overrides, *values.items())]
        trials.append(Trial(name, values, config, folder, ("train", f"--config={source}", *flags, f"--workdir={folder}")))
    if problems:
        raise configs.ConfigError("--sweep", [f"{problem}   (in {name})" for problem, name in problems.items()])
    _check_distinct(trials)
    _check_comparable(trials)
    if axes.tuned:
        return _in_two_stages(trials, axes)
    return Sweep(tuple(trials), (), ())


def _check_distinct(trials: Sequence[Trial]) -> None:
    """Refuses two spellings of one value, such as 0.1 and 1e-1."""
    seen: dict[Config, str] = {}
    problems = []
    for trial in trials:
        twin = seen.setdefault(trial.config, trial.name)
        if twin != trial.name:
            problems.append(f"{twin} and {trial.name} are the same experiment")
    if problems:
        raise configs.ConfigError("--sweep", problems)


def _check_comparable(trials: Sequence[Trial]) -> None:
    """Refuses trials that are judged by different metrics, or by the losses of different objectives."""
    judged = {trial.config.compared_by: trial.name for trial in trials}
    if len(judged) > 1:
        by = "; ".join(f"{best} (in {name})" for best, name in judged.items())
        raise configs.ConfigError("--sweep", [f"eval.best: a sweep compares its trials by one metric, here are {by}"])


def _check_keys(axes: grammar.Axes, overrides: Sequence[tuple[str, str]]) -> None:
    legal, fixed = configs.legal_keys(), {key for key, _ in overrides}
    problems = [f"{key}: both swept and set by --config.{key}" for key in axes.keys if key in fixed]
    open_ended = ("model.kwargs.", "dataset.kwargs.")  # checked by the model or data set
    given = {*fixed, *axes.keys}
    problems += [f"{key}: conflicts with {other}" for key in axes.keys for other in given if other.startswith(f"{key}.")]
    problems += [f"{key}: cannot be tuned" for key in axes.tuned if key in _NOT_TUNED]
    for key in axes.keys:
        if key not in legal and not key.startswith(open_ended):
            problems.append(f"{key}: unknown key{did_you_mean(key, legal)}")
    if problems:
        raise configs.ConfigError("--sweep", problems)


def _relevant(assignment: grammar.Assignment, method: Any) -> grammar.Assignment:
    """The assignment without settings that a dense network ignores; `method` is the config's, if it is not swept."""
    if assignment.get("lowrank.method", method) != "none":
        return assignment
    return {key: text for key, text in assignment.items() if not meaningless_when_dense(key)}


def meaningless_when_dense(key: str) -> bool:
    """Whether a setting has no effect if no kernel is factored."""
    return key != "lowrank.method" and key.startswith(_OF_FACTORS)


class _Parser:
    """Parses configs that differ in a few values; those that differ only in the seed are checked once."""

    def __init__(self, source: str, overrides: Sequence[tuple[str, str]]):
        self._source, self._overrides = source, overrides
        self._base = configs.overridden(source, overrides)
        lowrank = self._base.get("lowrank")
        self.method = lowrank.get("method") if isinstance(lowrank, ConfigDict) else None
        self._known: dict[tuple[tuple[str, str], ...], Config | configs.ConfigError] = {}

    def __call__(self, values: grammar.Assignment) -> Config:
        seed = values.get("seed", "")
        if not re.fullmatch(r"0|[1-9]\d{0,8}", seed):  # for the error message about the seed
            return self._parse(values)
        rest = tuple((key, text) for key, text in values.items() if key != "seed")
        if rest not in self._known:
            try:
                self._known[rest] = self._parse(dict(rest))
            except configs.ConfigError as error:
                self._known[rest] = error
        found = self._known[rest]
        if isinstance(found, configs.ConfigError):
            raise found
        return dataclasses.replace(found, seed=int(seed))

    def _parse(self, values: grammar.Assignment) -> Config:
        # With those of all trials once more: each may contradict one of this trial's.
        config = configs.read(self._base, [*self._overrides, *values.items()], source=self._source)
        if len(config.lowrank.budget.amounts) > 1:
            configs.make_plan(config)  # only this tells whether two budgets can hold together
        return config


def _in_two_stages(trials: list[Trial], axes: grammar.Axes) -> Sweep:
    unheld = [trial.name for trial in trials if trial.config.dataset.valid_split is None]
    if unheld:
        example = "--config.dataset.train_split='train[:90%]' --config.dataset.valid_split='train[90%:]'"
        raise configs.ConfigError("--sweep", [f"tune(...): needs dataset.valid_split to choose on, e.g. {example}"])
    if any("seed" in term[0] and len(term[0]) > 1 for term in axes.terms):
        raise configs.ConfigError("--sweep", ["zip(...): with tune(...) the seed must be a term of its own"])
    seed = next((term[0]["seed"] for term in axes.terms if "seed" in term[0]), None)
    first = [trial for trial in trials if trial.values.get("seed") == seed]
    return Sweep(tuple(first), tuple(trial for trial in trials if trial not in first), axes.tuned)


Merit = tuple[float, float, list[str]]


def merit(results: Sequence[dict[str, Any]], tuning: Sequence[Any], best: Best) -> Merit:
    """The sort key for choosing tuned values by the results of their runs: the metric on the held-out split, then its loss.

    A metric that counts nobody is worse than any number.  Ties are common on a small split, and sweep and report must choose
    alike, so the last criterion is the values themselves.
    """
    values, losses = ([result["valid"][name] for result in results] for name in (best.metric, "loss"))
    score = -math.inf if None in values else best.score(statistics.fmean(values))
    return score, -statistics.fmean(losses), [str(value) for value in tuning]


def _same_tuning(trial: Trial, other: Trial | None, tuned: Sequence[str]) -> bool:
    return other is not None and all(trial.values.get(key) == other.values.get(key) for key in tuned)


def _size(config: Config) -> list[str]:
    plan = configs.make_plan(config)
    return [count(plan.params), count(plan.macs), str(config.total_steps)]


def check_workdirs(trials: Iterable[Trial]) -> None:
    """Raises WorkdirError, with all problems, if work directories belong to other experiments, or are links."""
    problems = []
    for trial in trials:
        try:
            folder = Workdir(trial.workdir)
            Workdir(folder.path.parent).check_own(folder.path.name)
            earlier = [configs.to_dict(config) for config in trial.config.earlier()]
            folder.check(configs.to_dict(trial.config), earlier)
        except WorkdirError as error:
            problems.append(str(error))
    if problems:
        raise WorkdirError("\n".join(problems))


def record(folder: epath.PathLike, sweep: Sweep, trials: Sequence[Trial], command: str) -> None:
    """Adds trials to sweep.json, which keeps those of earlier sweeps in the same folder."""
    home = Workdir(folder)
    files.make_folder(home.path)
    known = read_record(folder)
    home.write_json(
        "sweep.json",
        {
            "commands": list(dict.fromkeys([*known["commands"], command])),
            "tuned": list(dict.fromkeys([*known["tuned"], *sweep.tuned])),
            "trials": {**known["trials"], **{trial.name: trial.values for trial in trials}},
        },
    )


def read_record(folder: epath.PathLike) -> dict[str, Any]:
    """The contents of sweep.json; empty if there is none.

    Raises:
      WorkdirError: it is damaged.
    """
    found = Workdir(folder).read_json("sweep.json") or {}
    record = {"commands": found.get("commands", []), "tuned": found.get("tuned", []), "trials": found.get("trials", {})}
    texts = [record["commands"], record["tuned"]]
    well_formed = all(isinstance(listed, list) and all(isinstance(text, str) for text in listed) for listed in texts)
    if not well_formed or not isinstance(record["trials"], dict) or not all(map(_NAME.fullmatch, record["trials"])):
        raise WorkdirError(f"{folder}/sweep.json is damaged: it is not the record of a sweep")
    return record
