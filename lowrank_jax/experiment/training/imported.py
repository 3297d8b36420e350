"""The state before the first step from trained weights: ranks are chosen by them, and the network is factored at once."""

import time
from collections.abc import Callable

import jax

from lowrank_jax.experiment.config.plan import chooses_ranks, plan_by_rules
from lowrank_jax.experiment.hosts.sharding import replicated
from lowrank_jax.experiment.training import ranks, weights
from lowrank_jax.experiment.training.overview import sizes
from lowrank_jax.experiment.training.phases import Phases
from lowrank_jax.experiment.training.start import UNKNOWN, Batches
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.training.switch import allocated_by_values, whole
from lowrank_jax.experiment.workdir.writer import duration


def first_state(
    phases: Phases, trained: weights.Trained, batches: Batches, say: Callable[[str], None]
) -> tuple[Phases, TrainState]:
    """The phases, with the ranks that were chosen by the weights, and the first state; every process calls this.

    Args:
      phases: of a run whose config has `init.weights`.
      trained: what it begins with.
      batches: what the layers are measured on.
      say: takes a line for the console.
    """
    begun, first = time.perf_counter(), phases.at(0)
    config = first.config
    say(f"weights of {config.init.weights}, {trained.digest}")
    variables = jax.device_put(trained.variables, replicated(first.mesh))
    if not config.is_imported or not first.plan.kernels or config.lowrank.method == "none":
        return phases, first.start().state_of(variables, UNKNOWN)
    known = UNKNOWN
    if config.lowrank.moment_batches:
        # Of all kernels also where the ranks were decided by an earlier start: programs of other kernels round differently.
        plan = plan_by_rules(config).opened() if chooses_ranks(config) else first.plan
        known = first.start().calibration(variables, batches, plan)
    if chooses_ranks(config) and not phases.decided:
        made = allocated_by_values(first, variables["params"], whole(known, first))
        phases = phases.decide(ranks.agreed(config, made, 0))
    state = phases.at(0).start().state_of(variables, known)
    say(f"factored in {duration(time.perf_counter() - begun)}: {sizes(phases.last)}")
    return phases, state
