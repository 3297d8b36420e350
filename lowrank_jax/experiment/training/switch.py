"""From the first phase to the last one: what becomes of each part of the training state.

After self-guided training the guides are dropped, with all that is stored for them, and everything else goes on.  After a dense
warm-up:

Parameters: kernels are factored as before training, by the rules' methods.
Momentum of `sgd`, a sum of gradients: by the chain rule, that of U is M Vᵀ and that of V is Uᵀ M.
Momentum of `rmsprop` and `lars`, a sum of steps: of factors it begins at zero, of everything else it stays.
Moments of `adamw` and `lamb`: all begin anew, with their count, as one count corrects the bias of all of them.
Averages of the weights: those of factors begin with the factors, as an average of other factors has another gauge; the others
stay.
Step, learning rate, order of the data, statistics of BatchNorm and the model's other collections go on.
"""

import dataclasses
import json
from typing import Any

import jax
import optax

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.plan import allocated, chooses_ranks, make_plan, plan_by_rules
from lowrank_jax.experiment.guided import without_guides
from lowrank_jax.experiment.hosts.processes import exchange
from lowrank_jax.experiment.hosts.sharding import replicated
from lowrank_jax.experiment.training import ranks
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.phases import Phases
from lowrank_jax.experiment.training.start import UNKNOWN, Batches, Calibration, Weights, fresh_state, on_host
from lowrank_jax.experiment.training.state import TrainState, key
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.linen.factorize import factorize, merge
from lowrank_jax.planning.plans import Plan


def decided_after(phases: Phases, state: TrainState, batches: Batches, step: int) -> Phases:
    """The phases with the ranks that go by the network as it is trained by now; every process calls this.

    Args:
      phases: of the run.
      state: of the dense network.
      batches: see `Batches`.
      step: the state's.
    """
    config = phases.last.config
    if phases.decided or (config.dense_steps is not None and not chooses_ranks(config)):
        return phases
    plan = _allocated(phases.last, state, batches) if chooses_ranks(config) else make_plan(config)
    return phases.decide(ranks.agreed(config, plan, step))


def _allocated(low_rank: Experiment, state: TrainState, batches: Batches) -> Plan:
    plan = plan_by_rules(low_rank.config)
    known = _calibration(low_rank, state, batches, plan.opened())
    return allocated_by_values(low_rank, whole(state.params, low_rank), whole(known, low_rank))


def allocated_by_values(low_rank: Experiment, params: Any, known: Calibration) -> Plan:
    """The plan with the ranks that process 0 chooses by the dense network; every process calls this.

    Args:
      low_rank: the experiment.
      params, known: of the dense network, whole on every device.
    """
    plan, problems = plan_by_rules(low_rank.config), []
    params, known = on_host(params), on_host(known)
    if jax.process_index() == 0:
        try:
            plan = allocated(low_rank.config, plan, variables=params, **known._asdict())
        except ConfigError as error:
            problems = error.problems
    if problems := json.loads(exchange(json.dumps(problems))[0]):  # the others wait for the ranks
        raise ConfigError("config", problems)
    return plan


def switched(low_rank: Experiment, state: TrainState, batches: Batches) -> TrainState:
    """The state of the low-rank network, from that of the dense one.

    Args:
      low_rank: the experiment to go on with.
      state: of the dense network, laid out over the same devices.
      batches: see `Batches`.
    """
    start, config = low_rank.start(), low_rank.config
    known = _calibration(low_rank, state, batches, low_rank.plan)
    if start.on_host:
        variables = whole({"params": state.params, "batch_stats": state.batch_stats, **state.collections}, low_rank)
        params = start.factored_by_host(variables, known).params
        carry = lambda state, params: carried(state, params, start.optimizer, config.optim.name)  # noqa: E731
        return jax.jit(carry, out_shardings=low_rank.shardings())(state, params)

    def surgery(state: TrainState, known: Calibration) -> TrainState:
        # Decompositions of sharded matrices would be taken apart by the compiler.
        dense = jax.lax.with_sharding_constraint(state.params, replicated(low_rank.mesh))
        params = factorize(dense, low_rank.plan, key=key(start.seed, "factorize"), **known._asdict())
        return carried(state, params, start.optimizer, config.optim.name)

    return jax.jit(surgery, out_shardings=low_rank.shardings())(state, known)


def unguided(last: Experiment, state: TrainState) -> TrainState:
    """The state of the low-rank network, from that of self-guided training; no array is touched.

    Args:
      last: the experiment to go on with.
      state: with guides, laid out over the same devices.
    """
    return jax.tree.unflatten(jax.tree.structure(last.shapes), jax.tree.leaves(without_guides(state)))


def carried(state: TrainState, params: Any, optimizer: optax.GradientTransformation, name: str) -> TrainState:
    """The state with the parameters factored.

    Args:
      state: of the dense network.
      params: its parameters with factor pairs.
      optimizer: of the factored parameters.
      name: the optimiser's, which says what its momentum is.
    """
    fresh = fresh_state(Weights(params, state.batch_stats, state.collections), optimizer, ema=bool(state.ema))
    opt_state = _carried_optimizer(fresh.opt_state, state.opt_state, params, name)
    ema = {**state.ema, "params": _unfactored_kept(params, state.ema["params"])} if state.ema else state.ema
    return dataclasses.replace(fresh, step=state.step, opt_state=opt_state, ema=ema)


def _carried_optimizer(fresh: Any, old: Any, params: Any, name: str) -> Any:
    def carry(fresh: Any, old: Any) -> Any:
        if isinstance(fresh, optax.ScaleByAdamState):
            return fresh
        if isinstance(fresh, optax.TraceState) and name == "sgd":
            return optax.TraceState(_of_factors(params, old.trace))
        return fresh if is_low_rank(fresh) else old

    parts = (optax.ScaleByAdamState, optax.TraceState) if name == "sgd" else optax.ScaleByAdamState

    def is_leaf(node: Any) -> bool:
        return is_low_rank(node) or isinstance(node, parts)

    # In order: a chain has a part without arrays for each multiplier of decay, and factors may have other ones.
    leaves, structure = jax.tree.flatten(fresh, is_leaf)
    return jax.tree.unflatten(structure, map(carry, leaves, jax.tree.leaves(old, is_leaf)))


def _of_factors(params: Any, gradients: Any) -> Any:
    """Gradients of dense kernels as gradients of their factors."""
    _, pull_back = jax.vjp(merge, params)
    return pull_back(gradients)[0]


def _unfactored_kept(params: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: new if is_low_rank(new) else old, params, old, is_leaf=is_low_rank)


def _calibration(low_rank: Experiment, state: TrainState, batches: Batches, plan: Plan) -> Calibration:
    if not low_rank.config.lowrank.moment_batches:
        return UNKNOWN
    variables = {"params": state.params, "batch_stats": state.batch_stats, **state.collections}
    return low_rank.start().calibration(variables, batches, plan)


def whole(tree: Any, experiment: Experiment) -> Any:
    """Arrays, on every device."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(experiment.mesh))(tree)
