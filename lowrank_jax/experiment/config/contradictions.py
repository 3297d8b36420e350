"""Overrides that ask for a scale or a rank where a budget chooses ranks: one of the two would silently count for nothing."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from lowrank_jax.experiment.config.schema import BUDGETS

_SIZES = ("lowrank.scale", "lowrank.rank")


def contradictions(config: ConfigDict, given: Collection[str]) -> list[str]:
    """A problem for every size that was asked for beside a budget; sizes that stand in the config itself are meant for others.

    Args:
      config: with the overrides.
      given: the keys that the overrides set.
    """
    values = {key: _value(config, key) for key in (*_SIZES, *BUDGETS)}
    sizes = [key for key in _SIZES if key in given and values[key] is not None]
    budgets = [key for key in BUDGETS if values[key] is not None]
    if not budgets:
        return []
    return [f"{size}: {values[size]!r}; {_way_out(size, budgets, given)}" for size in sizes]


def _way_out(size: str, budgets: list[str], given: Collection[str]) -> str:
    named = " and ".join(budgets)
    kind = size.rpartition(".")[2]
    takes = "takes" if len(budgets) == 1 else "take"
    unset = " and ".join(f"drop {key}" if key in given else f"set {key}=None" for key in budgets)
    return f"{named} {takes} the place of a general {kind}; drop {size} for the budget, or {unset} for the {kind}"


def _value(config: ConfigDict, key: str) -> Any:
    """What a key is set to; None where a section is something else, which `parse` says."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, ConfigDict) else None
    return node
