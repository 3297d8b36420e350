"""The ranks that a budget or energies chose, in `ranks.json` of a work directory: decided once, and never computed again."""

import json
from typing import Any, NamedTuple

from lowrank_jax.experiment.config.plan import chooses_ranks, has_budget, make_plan, plan_by_rules
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.hosts.processes import exchange
from lowrank_jax.experiment.workdir import step_folders
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.files import is_count
from lowrank_jax.experiment.workdir.identity import check_experiment, digest_of
from lowrank_jax.experiment.workdir.workdir import RANKS, Workdir
from lowrank_jax.planning.decided import from_record, to_record
from lowrank_jax.planning.plans import Plan


class Decided(NamedTuple):
    """What was decided.

    Attributes:
      step: after which the network has these ranks: the last one of a dense warm-up, or 0.
      plan: the ranks.
    """

    step: int
    plan: Plan


def read(folder: Workdir, config: Config) -> Decided | None:
    """What was decided for a run; None if nothing was, or nothing has to be.

    Raises:
      WorkdirError: the record is damaged, or of another network, or gone, or is there though the run chooses no ranks.
    """
    record = folder.read_json(RANKS)
    if record is None:
        needed = _needed_by(folder, config)
        record = folder.read_json(RANKS)  # a training may have written both meanwhile, this one first
        if record is None and needed:
            raise WorkdirError(f"{folder.path}/{RANKS} is missing, which has the ranks of checkpoint {needed}; put it back")
    if record is None:
        return None
    try:
        if record.keys() - {"worth"} != {"step", "ranks", "experiment"} or not is_count(record["step"]):
            raise ValueError("it has no step, ranks and experiment")
        if not isinstance(record["experiment"], str):
            raise ValueError("it names no experiment")
        check_experiment(record, config)
        if not may_choose(config):
            raise ValueError("this run chooses no ranks")
        _check_step(record["step"], config)
        return _decided(config, record["step"], record)
    except ValueError as error:
        advice = "put it back as it was" if _needed_by(folder, config) else "remove it, as no checkpoint has its ranks"
        raise WorkdirError(f"{folder.path}/{RANKS} is damaged: {error}; {advice}") from None


def may_choose(config: Config) -> bool:
    """Whether a run has such a record at some time."""
    return config.dense_steps is None or chooses_ranks(config)


def _check_step(step: int, config: Config) -> None:
    """Raises ValueError if the config's first phase cannot end with this step."""
    first = config.dense_steps
    latest = config.latest_switch if first is None else first
    if not (min(1, latest) if first is None else first) <= step <= latest:
        where = f"at most {latest}, and not 0" if first is None else str(first)
        raise ValueError(f"its step is {step}, and the config's is {where}")


def _needed_by(folder: Workdir, config: Config) -> int | None:
    """The latest checkpoint that only ranks which were decided can be of; None if there is none."""
    first = config.dense_steps
    if first is None:
        with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
            later = [step for step, info in checkpoints.records().items() if info.get("low_rank")]
    else:
        stored = step_folders.stored(folder.checkpoints) if chooses_ranks(config) else []
        later = [step for step in stored if step > first or config.is_imported]
    return max(later, default=None)


def settle(folder: Workdir, config: Config, *, restart: bool = False) -> Decided | None:
    """What was decided, or what the budget affords before training; None if ranks are the rules', or a warm-up comes first.

    Every process calls this and gets what process 0 decided.

    Args:
      folder, config: of the run.
      restart: decide anew if the run was saved and its checkpoints are gone.

    Raises:
      WorkdirError: see `read`.
      ConfigError: the budget is impossible.
    """
    anew = restart and folder.saved() is not None and not step_folders.stored(folder.checkpoints)
    if not anew and (found := read(folder, config)):
        return found
    if not has_budget(config) or config.starts_dense or config.is_imported:
        return None
    return agreed(config, make_plan(config), 0)


def agreed(config: Config, plan: Plan, step: int) -> Decided:
    """What process 0 decided; the others may have rounded differently."""
    return _decided(config, step, json.loads(exchange(json.dumps(to_record(plan)))[0]))


def _decided(config: Config, step: int, record: Any) -> Decided:
    return Decided(step, from_record(plan_by_rules(config), record, budget=has_budget(config)))


def write(folder: Workdir, config: Config, decided: Decided) -> None:
    """Writes the record, unless it is there."""
    if folder.read_json(RANKS) is None:
        folder.write_json(RANKS, {"step": decided.step, **to_record(decided.plan), "experiment": digest_of(config)})
