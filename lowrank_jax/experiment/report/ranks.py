"""The ranks that were chosen for a run's kernels, for a budget or by energies, from its ranks.json."""

from collections.abc import Mapping
from typing import Any

from lowrank_jax.experiment.workdir.files import is_count
from lowrank_jax.experiment.workdir.identity import run_digests
from lowrank_jax.experiment.workdir.workdir import RANKS, Workdir, WorkdirError

Ranks = Mapping[str, int | None]
"""By kernel, in the network's order; None where it stays dense."""


def read(folder: Workdir, config: dict[str, Any]) -> Ranks | None:
    """The ranks of a run with this config; None if it has stored none.

    Raises:
      WorkdirError: the record is damaged, or another run's.
    """
    record = folder.read_json(RANKS)
    if record is None:
        return None
    if record.get("experiment") not in (None, *run_digests(config)):
        raise WorkdirError(f"{folder.path}/{RANKS} is damaged: it is another experiment's; put it back as it was")
    ranks = record.get("ranks")
    if not isinstance(ranks, dict) or not all(entry is None or _is_rank(entry) for entry in ranks.values()):
        raise WorkdirError(f"{folder.path}/{RANKS} is damaged: it has no rank for every kernel")
    return {name: entry and entry["rank"] for name, entry in ranks.items()}


def by_energies(settings: Mapping[str, Any]) -> bool:
    """Whether a rule of a run's settings, by dotted key, gives an energy."""
    rules = settings.get("lowrank.rules") or ()
    return any(isinstance(rule, Mapping) and rule.get("energy") is not None for rule in rules)


def _is_rank(entry: Any) -> bool:
    return isinstance(entry, dict) and is_count(entry.get("rank")) and entry["rank"] > 0
