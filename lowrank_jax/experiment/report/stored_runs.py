"""Work directories as a report reads them: settings, metrics and outcome."""

import contextlib
import dataclasses
import errno
import json
import math
import pathlib
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from lowrank_jax.experiment.best import Best
from lowrank_jax.experiment.config.schema import BUDGETS
from lowrank_jax.experiment.report import ranks
from lowrank_jax.experiment.report.ranks import Ranks
from lowrank_jax.experiment.report.speed import images_per_second
from lowrank_jax.experiment.sweep.trials import meaningless_when_dense, read_record
from lowrank_jax.experiment.workdir import files, stored_values
from lowrank_jax.experiment.workdir.identity import config_digest, differing_keys, flatten, has_budget
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError

SIZES = ("lowrank.scale", "lowrank.rank")
_DEPTH = 3  # of folders below a given one that are searched for work directories
_NO_FOLDER = (errno.ENOTDIR, errno.ENOENT, errno.ELOOP)  # a file; deleted meanwhile, or a link to nothing; a link to itself


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """One work directory.

    Attributes:
      name: its path below the given folder.
      settings: the config by dotted key, without what has no effect; see `_with_effect`.
      status: `done`, `diverged`, `failed`, `stopped` by a scheduler, `unfinished`, `not started`, `damaged`: one of its files
        cannot be read or relied on, `repeated`: the same experiment as another run, which is counted instead, or `apart`: it
        was judged by another metric than most of the others, or by the loss of another objective.
      reason: for the status, unless the run is done.
      result: the contents of result.json; empty unless the run is done.
      metrics: the lines of metrics.jsonl.
      ranks: that a budget chose; None without one.
    """

    name: str
    settings: dict[str, Any]
    status: str
    reason: str
    result: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    ranks: Ranks | None = None

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def best(self) -> Best:
        """The metric that it was judged by."""
        return Best.of(self.settings)

    @property
    def compared_by(self) -> str:
        """What other runs must share to be compared with this one."""
        return self.best.measured_as(self.settings["objective.name"], self.settings["objective.loss"])

    @property
    def seed(self) -> int:
        return self.settings.get("seed", 0)

    @property
    def switch(self) -> int:
        """The step with which the dense warm-up or self-guided training of a finished run ended; 0 without."""
        return self.result.get("dense_steps") or self.result.get("guided_steps") or 0  # earlier versions wrote neither

    def curve(self, name: str) -> list[tuple[int, float]]:
        """`(step, value)` of a metric, where it was logged and finite."""
        return [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]

    def figure(self, name: str) -> float:
        """One number of a finished run: `params`, `macs`, `images/s` of its last phase, `images/s before` of the one before it,
        `early loss`, or a metric such as `eval/top1`.
        """
        if name in ("images/s", "images/s before"):
            steps = (self.switch,) if name == "images/s" else (0, self.switch)
            return images_per_second(self.curve("train/images_per_second"), *steps)
        if name == "early loss" and self.metrics and self.metrics[0].keys() == {"step"}:
            return math.nan  # the first metrics are missing
        if name == "early loss":
            curve = self.curve("train/loss")
            return curve[0][1] if curve else math.nan
        section, _, metric = name.partition("/")
        if not metric:
            return self.result[section]
        value = (self.result.get(section) or {}).get(metric)
        return math.nan if value is None else value


@dataclasses.dataclass(frozen=True)
class Found:
    """All runs of a report.

    Attributes:
      runs: sorted by name.
      varied: the keys whose values differ between them.
      tuned: the keys that sweeps tuned.
      commands: the command lines of the sweeps.
      best: the metric that the runs were judged by.
    """

    runs: tuple[StoredRun, ...]
    varied: tuple[str, ...]
    tuned: tuple[str, ...]
    commands: tuple[str, ...]
    best: Best = Best()


def find(folders: Sequence[str]) -> Found:
    """Finds every work directory at or below some folders, local or remote; what cannot be read is `damaged`.

    Raises:
      WorkdirError: there is none.
    """
    runs: dict[str, StoredRun] = {}  # by path: a folder may be given twice, or inside another one
    unusable: dict[str, StoredRun] = {}  # folders that cannot be listed, and records of sweeps
    commands, tuned = [], []
    for folder in folders:
        home = _home(folder)
        for path, names, error in _walk(home, _DEPTH, set()):
            label = _label(folder, home, path, folders)
            if error is not None:
                unusable[str(path)] = _damaged(label, error)
            if "sweep.json" in names:
                file = path / "sweep.json"
                try:
                    record = read_record(path)
                    commands += record["commands"]
                    tuned += record["tuned"]
                    runs |= _not_started(path, record["trials"], label)
                except (WorkdirError, OSError) as damage:
                    unusable[str(file)] = _damaged(_label(folder, home, file, folders), damage)
            if "config.json" in names:
                runs[str(path)] = _read(path, label, read)
    if not runs:
        nothing = f"{', '.join(folders)}: no work directory found (a folder with a config.json)"
        raise WorkdirError("\n".join([nothing, *(run.reason for run in unusable.values())]))
    found = _without_repeated(sorted((runs | unusable).values(), key=lambda run: run.name))
    usual = _usual(found)
    best = usual.best if usual else Best()
    found = [_apart(run, usual) if usual and run.done and run.compared_by != usual.compared_by else run for run in found]
    return Found(tuple(found), tuple(_varied(found)), tuple(dict.fromkeys(tuned)), tuple(dict.fromkeys(commands)), best)


def _usual(runs: Sequence[StoredRun]) -> StoredRun | None:
    """One that was judged as most of the finished runs were."""
    known = [run for run in runs if run.done] or [run for run in runs if run.settings]
    judged = [run.compared_by for run in known]
    return max(known, key=lambda run: judged.count(run.compared_by), default=None)


def _apart(run: StoredRun, usual: StoredRun) -> StoredRun:
    reason = f"it was judged by {run.compared_by}, others by {usual.compared_by}: report them apart"
    return dataclasses.replace(run, status="apart", reason=reason, result={})


def _home(folder: str) -> Any:
    try:
        home = Workdir(folder).path
        if home.is_dir():
            return home
    except (ValueError, ImportError, NotImplementedError) as error:  # unknown URL scheme, or its package is missing
        raise WorkdirError(f"{folder}: {error}") from None
    raise WorkdirError(f"{folder} is not a folder")


def _without_repeated(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """Of runs with the same settings one counts, preferably a finished one; the others get the status `repeated`."""
    counted: dict[str, StoredRun] = {}
    for run in sorted(runs, key=lambda run: not run.done):
        counted.setdefault(_identity(run), run)
    return [
        run if counted[_identity(run)] is run else dataclasses.replace(run, status="repeated", reason=_same_as(counted, run))
        for run in runs
    ]


def _identity(run: StoredRun) -> str:
    return config_digest(run.settings) if run.settings else run.name


def _same_as(counted: dict[str, StoredRun], run: StoredRun) -> str:
    return f"the same experiment as {counted[_identity(run)].name}"


def _varied(runs: Sequence[StoredRun]) -> list[str]:
    """The keys with more than one value among the runs; to lack a key is a value too.

    Except of factors in dense runs, and of what only says how a budget is meant in runs without one.
    """
    settings = [{key: json.dumps(value, sort_keys=True) for key, value in run.settings.items()} for run in runs if run.settings]
    return [
        key for key in differing_keys(settings) if len({values.get(key) for values in settings if _may_vary(key, values)}) > 1
    ]


def _may_vary(key: str, values: dict[str, str]) -> bool:
    if values["lowrank.method"] == json.dumps("none") and meaningless_when_dense(key):
        return False
    return key in values or key in BUDGETS or not key.startswith("lowrank.budget.")


def _walk(folder: Any, depth: int, seen: set[Any]) -> Iterator[tuple[Any, set[str], OSError | None]]:
    """Every folder at or below one, with the names in it, or with why they cannot be listed."""
    try:
        place = _place(folder)
        if place in seen:  # a link leads back
            return
        seen.add(place)
        children = {child.name: child for child in sorted(folder.iterdir(), key=str)}
    except OSError as error:
        if error.errno not in _NO_FOLDER:
            yield folder, set(), error
        return
    yield folder, set(children), None
    if depth and "config.json" not in children:  # a work directory contains no others
        for child in children.values():
            yield from _walk(child, depth - 1, seen)


def _place(folder: Any) -> Any:
    """What tells folders apart that have several paths.  Raises OSError if this is none."""
    if not files.is_local(folder):
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
        return str(folder)
    found = pathlib.Path(folder).stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
    return found.st_dev, found.st_ino


def _label(folder: str, home: Any, path: Any, folders: Sequence[str]) -> str:
    """The shortest unambiguous path of a work directory."""
    below = str(path)[len(str(home)) :].strip("/")
    if below and len(folders) == 1:
        return below
    ambiguous = [Workdir(other).path.name for other in folders].count(home.name) > 1
    return "/".join(part for part in (folder.rstrip("/") if ambiguous else home.name, below) if part)


def _not_started(path: Any, trials: dict[str, Any], label: str) -> dict[str, StoredRun]:
    prefix = "" if path.name == label or not label else f"{label}/"
    missing = [name for name in trials if not (path / name / "config.json").exists()]
    return {str(path / name): _read(path / name, f"{prefix}{name}", _without_config) for name in missing}


def _read(path: Any, name: str, reader: Callable[[Any, str], StoredRun]) -> StoredRun:
    try:
        return reader(path, name)
    except (WorkdirError, OSError, RecursionError) as error:
        return _damaged(name, error)


def _damaged(name: str, error: Exception) -> StoredRun:
    reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return StoredRun(name, {}, "damaged", reason, {}, ())


def read(path: epath.PathLike, name: str) -> StoredRun:
    """Reads one work directory.

    Raises:
      WorkdirError: one of its files is damaged.
      OSError: one of them cannot be read.
    """
    folder = Workdir(path)
    config = folder.read_config()
    settings = flatten(config)
    with _names_the_file(folder, "config.json"):
        stored_values.check_settings(settings)
        best = Best.of(settings)
    settings = _with_effect(settings)
    metrics = tuple(folder.metrics.read())
    with _names_the_file(folder, "metrics.jsonl"):
        for line in metrics:
            stored_values.check_metrics(line)
    result = folder.read_json("result.json")
    if result is None:
        ended = _ended(folder) or ("unfinished", f"at step {metrics[-1]['step'] if metrics else 0}")
        return StoredRun(name, settings, *ended, {}, metrics)
    with _names_the_file(folder, "result.json"):
        stored_values.check_result(result, best.metric)
    own = config_digest(config)
    if result.get("config_digest", own) != own:  # earlier versions wrote none
        raise WorkdirError(f"{folder.path}: result.json belongs to other settings than config.json")
    if "metrics" in result:
        folder.metrics.check(result["metrics"])
        _check_agreement(folder, result, metrics)
    chosen = ranks.read(folder, config) if has_budget(settings) or ranks.by_energies(settings) else None
    return StoredRun(name, settings, "done", "", result, metrics, chosen)


def _with_effect(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the settings of factors for a dense network, of a general size beside a budget, and of a budget without one."""
    if settings["lowrank.method"] == "none":
        return {key: value for key, value in settings.items() if not meaningless_when_dense(key)}
    idle = SIZES if has_budget(settings) else tuple(key for key in settings if key.startswith("lowrank.budget."))
    return {key: value for key, value in settings.items() if key not in idle}


def _check_agreement(folder: Workdir, result: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> None:
    """Raises WorkdirError if metrics.jsonl ends in another evaluation: both files were written from the same numbers."""
    evaluations = [line for line in metrics if any(key.startswith("eval/") for key in line)]
    if not evaluations or evaluations[-1]["step"] != result.get("step"):
        return
    logged = {key: value for key, value in evaluations[-1].items() if key.startswith("eval/")}
    final = {f"eval/{key}": value for key, value in result["eval"].items()}
    for key in sorted(logged.keys() | final.keys()):
        if key not in logged or key not in final or logged[key] != final[key]:
            raise WorkdirError(f"{folder.path}: result.json and metrics.jsonl differ in {key}")


@contextlib.contextmanager
def _names_the_file(folder: Workdir, name: str) -> Iterator[None]:
    try:
        yield
    except stored_values.NotMeasured as error:
        raise WorkdirError(f"{folder.path}: {error}") from None
    except ValueError as error:
        raise WorkdirError(f"{folder.path}/{name} is damaged: {error}") from None


def _without_config(path: Any, name: str) -> StoredRun:
    """A trial of a sweep that has not come as far as to write its config."""
    return StoredRun(name, {}, *(_ended(Workdir(path)) or ("not started", "")), {}, ())


def _ended(folder: Workdir) -> tuple[str, str] | None:
    """Status and reason of a run that left a failure or a stop instead of a result, else None."""
    for name, meaning in (("failure.json", stored_values.failure), ("stopped.json", stored_values.stop)):
        note = folder.read_json(name)
        if note is not None:
            with _names_the_file(folder, name):
                return meaning(note)
    return None
