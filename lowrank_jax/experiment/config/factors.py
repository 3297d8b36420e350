"""Checks between the values of a config that say which kernels are factored and how: rules, budgets and warm-ups."""

from lowrank_jax.experiment.config.schema import BUDGETS, BudgetConfig, Config, LowRankConfig
from lowrank_jax.planning.chips import CHIPS
from lowrank_jax.projection.methods import TWO_SIDED

_FORGETFUL = ("random", "unit_spectral")
"""Methods that do not keep what a trained kernel does."""


def problems(config: Config, wrong: set[str]) -> list[str]:
    """Problems between values that are valid by themselves; `wrong` are the keys already reported."""
    low = config.lowrank
    if found := _weights_problems(config) + _two_sided_problems(config, wrong):
        return found
    if low.self_guided is not None and low.dense_warmup is not None:
        return [f"lowrank.self_guided: {low.self_guided}, and dense_warmup is set too; training begins with one of them"]
    if (low.dense_warmup is not None or config.init.weights) and (found := _forgotten(low)):
        return found
    if found := _budget_problems(low.budget, wrong):
        return found
    if low.budget.amounts:
        return _to_rules_problems(config, wrong)
    if low.method != "none" and low.scale is None and low.rank is None and not wrong & {"lowrank.scale", "lowrank.rank"}:
        return ["lowrank.scale: neither scale nor rank is set; for a dense network set lowrank.method=none"]
    if low.scale is not None and low.rank is not None:
        # A scale that was reported as wrong has fallen back to its default: not the user's.
        both = f"lowrank.rank: both rank ({low.rank}) and scale ({low.scale:g}) are set; set one to None"
        return [] if wrong & {"lowrank.scale"} else [both]
    return _to_rules_problems(config, wrong)


def _weights_problems(config: Config) -> list[str]:
    if config.init.weights is None:
        return [] if config.init.redraw is None else ["init.redraw: says nothing without init.weights"]
    return []


def _two_sided_problems(config: Config, wrong: set[str]) -> list[str]:
    """What keeps the gradients at the layers' outputs from being measured, or from meaning something."""
    low, budget = config.lowrank, config.lowrank.budget
    if low.method != TWO_SIDED:
        divergence = budget.objective == "divergence"
        return [f"lowrank.budget.objective: 'divergence'; needs lowrank.method={TWO_SIDED}"] if divergence else []
    found = []
    if low.dense_warmup is None and config.init.weights is None and not wrong & {"lowrank.dense_warmup", "init.weights"}:
        found.append(f"lowrank.method: {TWO_SIDED!r} is for trained weights; set init.weights, or lowrank.dense_warmup")
    if not low.moment_batches and "lowrank.moment_batches" not in wrong:
        found.append(f"lowrank.moment_batches: 0; the method {TWO_SIDED!r} measures the layers on some")
    if config.curvature is None:
        found.append(f"lowrank.method: {TWO_SIDED!r} does not know the curvature of your own loss; use another method")
    others = [rule.get("path") for rule in low.rules if rule.get("method", TWO_SIDED) not in (TWO_SIDED, "none")]
    return found + [f"lowrank.rules: {path!r}; with lowrank.method={TWO_SIDED} no rule can have another one" for path in others]


def _forgotten(low: LowRankConfig) -> list[str]:
    """Methods, the general one's or a rule's, that would undo a dense warm-up."""
    methods = {"lowrank.method": low.method}
    methods |= {f"lowrank.rules: {rule.get('path')!r}, method": rule.get("method") for rule in low.rules}
    reason = "it would forget what the dense network has learned"
    return [f"{key}: {method!r}; {reason}" for key, method in methods.items() if method in _FORGETFUL]


def _budget_problems(budget: BudgetConfig, wrong: set[str]) -> list[str]:
    """Settings of a budget that say nothing without another one, and more kinds than two."""
    kinds, usual = budget.amounts, BudgetConfig()
    if len(kinds) > 2:
        return [f"lowrank.budget: {', '.join(kinds)} are set; at most two kinds can hold at once"]
    if "seconds" in kinds and budget.chip is None and "lowrank.budget.chip" not in wrong:
        return [f"lowrank.budget.chip: seconds need a chip; one of {', '.join(CHIPS)}"]
    if not wrong.isdisjoint(BUDGETS):
        return []  # there is a budget, which has been reported
    needed = "a budget" if not kinds else "lowrank.budget.seconds"
    idle = ("chip", "batch", "rest") if "seconds" not in kinds else ()
    idle += ("objective", "min_scale") if not kinds else ()
    return [
        f"lowrank.budget.{key}: says nothing without {needed}" for key in idle if getattr(budget, key) != getattr(usual, key)
    ]


def _to_rules_problems(config: Config, wrong: set[str]) -> list[str]:
    low = config.lowrank
    try:
        rules = low.to_rules()
    except ValueError as error:
        return [f"lowrank: {line}" for line in str(error).splitlines()]
    energies = [rule.path for rule in rules if rule.energy is not None]
    return _energy_problems(energies[0], config, wrong) if energies else []


def _energy_problems(path: str, config: Config, wrong: set[str]) -> list[str]:
    """What the rules that give an energy do not go with; `path` is of the first one."""
    low = config.lowrank
    if low.dense_warmup is None and config.init.weights is None and not wrong & {"lowrank.dense_warmup", "init.weights"}:
        needed = "needs trained weights to go by: set lowrank.dense_warmup or init.weights, or scale or rank in the rule"
        return [f"lowrank.rules: the energy of rule {path!r} {needed}"]
    if low.budget.min_scale:
        smaller = f"the rank that the energy of rule {path!r} asks for may be smaller; set one of the two alone"
        return [f"lowrank.budget.min_scale: {low.budget.min_scale:g}; {smaller}"]
    return []
