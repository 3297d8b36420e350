"""Work directories as a report reads them: settings, metrics and outcome."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from lowrank_jax.experiment.sweep.trials import meaningless_when_dense, read_record
from lowrank_jax.experiment.workdir.identity import config_digest, differing_keys, flatten
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError

_DEPTH = 3  # of folders below a given one that are searched for work directories


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """One work directory.

    Attributes:
      name: its path below the given folder.
      settings: the config by dotted key; for a dense network without the settings of factors.
      status: `done`, `diverged`, `failed`, `stopped` by a scheduler, `unfinished`, `not started`, `damaged`, or `repeated`:
        the same experiment as another run, which is counted instead.
      reason: for the status, unless the run is done.
      result: the contents of result.json; empty unless the run is done.
      metrics: the lines of metrics.jsonl.
    """

    name: str
    settings: dict[str, Any]
    status: str
    reason: str
    result: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def seed(self) -> int:
        return self.settings.get("seed", 0)

    @property
    def images_per_second(self) -> float:
        """Training speed: the median over the log's windows without the first one, which includes compilation."""
        rates = [value for _, value in self.curve("train/images_per_second")]
        return statistics.median(rates[1:] or rates or [float("nan")])

    def curve(self, name: str) -> list[tuple[int, float]]:
        """`(step, value)` of a metric, where it was logged and finite."""
        return [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]

    def figure(self, name: str) -> float:
        """One number of a finished run: `params`, `macs`, `images/s`, `early loss`, or a metric such as `eval/top1`."""
        if name == "images/s":
            return self.images_per_second
        if name == "early loss":
            curve = self.curve("train/loss")
            return curve[0][1] if curve else math.nan
        section, _, metric = name.partition("/")
        return (self.result.get(section) or {}).get(metric, math.nan) if metric else self.result[section]


@dataclasses.dataclass(frozen=True)
class Found:
    """All runs of a report.

    Attributes:
      runs: sorted by name.
      varied: the keys whose values differ between them.
      tuned: the keys that sweeps tuned.
      commands: the command lines of the sweeps.
    """

    runs: tuple[StoredRun, ...]
    varied: tuple[str, ...]
    tuned: tuple[str, ...]
    commands: tuple[str, ...]


def find(folders: Sequence[str]) -> Found:
    """Finds every work directory at or below some folders, local or remote.

    Raises:
      WorkdirError: there is none, or a sweep.json is damaged.
    """
    runs: dict[str, StoredRun] = {}  # by path: a folder may be given twice, or inside another one
    commands, tuned = [], []
    for folder in folders:
        home = _home(folder)
        for path in _with_file(home, "sweep.json", _DEPTH):
            record = read_record(path)
            commands += record["commands"]
            tuned += record["tuned"]
            runs |= _not_started(path, record["trials"], _label(folder, home, path, folders))
        for path in _with_file(home, "config.json", _DEPTH):
            runs[str(path)] = _read_or_damaged(path, _label(folder, home, path, folders))
    if not runs:
        raise WorkdirError(f"{', '.join(folders)}: no work directory found (a folder with a config.json)")
    found = _without_repeated(sorted(runs.values(), key=lambda run: run.name))
    return Found(tuple(found), tuple(_varied(found)), tuple(dict.fromkeys(tuned)), tuple(dict.fromkeys(commands)))


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
    """The keys with more than one value among the runs that have them."""
    settings = [run.settings for run in runs if run.settings]
    return [
        key
        for key in differing_keys(settings)
        if len({json.dumps(values[key], sort_keys=True) for values in settings if key in values}) > 1
    ]


def _with_file(folder: Any, name: str, depth: int) -> Iterable[Any]:
    if (folder / name).exists():
        yield folder
        if name == "config.json":  # a work directory contains no others
            return
    if depth:
        for child in sorted(folder.iterdir(), key=str):
            if child.is_dir():
                yield from _with_file(child, name, depth - 1)


def _label(folder: str, home: Any, path: Any, folders: Sequence[str]) -> str:
    """The shortest unambiguous path of a work directory."""
    below = str(path)[len(str(home)) :].strip("/")
    if below and len(folders) == 1:
        return below
    ambiguous = [Workdir(other).path.name for other in folders].count(home.name) > 1
    return "/".join(part for part in (folder.rstrip("/") if ambiguous else home.name, below) if part)


def _not_started(path: Any, trials: dict[str, Any], label: str) -> dict[str, StoredRun]:
    missing = [name for name in trials if not (path / name / "config.json").exists()]
    prefix = "" if path.name == label or not label else f"{label}/"
    return {
        str(path / name): _ended(path / name, f"{prefix}{name}") or StoredRun(f"{prefix}{name}", {}, "not started", "", {}, ())
        for name in missing
    }


def _read_or_damaged(path: epath.PathLike, name: str) -> StoredRun:
    try:
        return read(path, name)
    except (WorkdirError, OSError) as error:
        return StoredRun(name, {}, "damaged", str(error), {}, ())


def read(path: epath.PathLike, name: str) -> StoredRun:
    """Reads one work directory.  Raises WorkdirError if one of its files is damaged."""
    folder = Workdir(path)
    settings = flatten(folder.read_config())
    if settings.get("lowrank.method") == "none":
        settings = {key: value for key, value in settings.items() if not meaningless_when_dense(key)}
    metrics = tuple(folder.metrics.read())
    result = folder.read_json("result.json")
    if result is not None:
        if "top1" not in (result.get("eval") or {"top1": None}):
            raise WorkdirError(f"{path}: a report compares top1, which is not among this run's objective.metrics")
        if not _is_result(result):
            raise WorkdirError(f"{path}/result.json is not the result of a run, or contains non-numbers")
        return StoredRun(name, settings, "done", "", result, metrics)
    ended = _ended(folder.path, name)
    status, reason = (
        (ended.status, ended.reason) if ended else ("unfinished", f"at step {metrics[-1]['step'] if metrics else 0}")
    )
    return StoredRun(name, settings, status, reason, {}, metrics)


def _is_result(result: dict[str, Any]) -> bool:
    evaluated = [result.get("eval"), *([result["valid"]] if result.get("valid") else [])]
    if not all(isinstance(metrics, dict) for metrics in evaluated) or not isinstance(result.get("versions"), dict):
        return False
    figures = [result.get(name) for name in ("params", "macs", "seconds")]
    figures += [metrics.get(name) for metrics in evaluated if metrics for name in ("top1", "loss")]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in figures)


def _ended(path: Any, name: str) -> StoredRun | None:
    """The run if it left a failure or a stop instead of a result, else None."""
    folder = Workdir(path)
    failure = folder.read_json("failure.json")
    if failure is not None:
        return StoredRun(name, {}, failure.get("status", "failed"), failure.get("reason", ""), {}, ())
    stopped = folder.read_json("stopped.json")
    return StoredRun(name, {}, "stopped", f"by {stopped.get('by')} at step {stopped.get('step')}", {}, ()) if stopped else None
