"""The plan of a config's model: which of its kernels are factored; and whether it can be trained and evaluated."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax import inputs
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.objectives import output_problems
from lowrank_jax.experiment.config.schema import Config, EvalConfig, LowRankConfig, OptimConfig
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.network import Network
from lowrank_jax.linen.plan import plan as plan_model
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.allocate import allocate, check_budget
from lowrank_jax.planning.chips import CHIPS
from lowrank_jax.planning.energy import awaited, least_bounded, unbounded
from lowrank_jax.planning.plans import Plan
from lowrank_jax.text import first_line


def make_plan(config: Config) -> Plan:
    """Decides which kernels of the model are factored, and at which ranks; results are cached.

    Only for a budget is anything computed: what every rank loses of a random kernel of each shape.  What trained weights decide
    is not known yet: a budget's ranks then are a forecast, and without a budget those of energies stay open.

    Raises:
      ConfigError: see `check_plan`.
    """
    plan, budget = plan_by_rules(config), budget_arguments(config)
    if not budget:
        return awaited(plan, "the run begins" if config.is_imported else "the dense warm-up ends")
    # Without values nothing is known of what the network's loss would gain.
    forecast = tuple((name, "tolerance" if value == "divergence" else value) for name, value in budget)
    return _allocated(unbounded(plan), tuple(kernel.normalized for kernel in plan.kernels), *forecast)


def has_budget(config: Config) -> bool:
    """Whether ranks are chosen for a budget."""
    return bool(budget_arguments(config))


def has_energies(config: Config) -> bool:
    """Whether the ranks of some kernels, or their bounds, go by the values of the kernels."""
    return bool(plan_by_rules(config).waiting)


def chooses_ranks(config: Config) -> bool:
    """Whether ranks are chosen and recorded, rather than those of the rules."""
    return has_budget(config) or has_energies(config)


def forecast(config: Config) -> str:
    """What of `make_plan` is not yet as it will be with trained weights, in words; "" if all of it is."""
    if not (config.starts_dense or config.is_imported) or not chooses_ranks(config):
        return ""
    chosen = "chosen as the run begins, from the weights that it is given"
    if not config.is_imported:
        chosen = "chosen then, from the trained weights"
    if not has_budget(config):
        return f"the ranks of energies are open, and their kernels count as dense; they are {chosen}"
    bounded = ", and energies bound them" if has_energies(config) else ""
    return f"by shapes and costs alone; ranks are {chosen}{bounded}"


def dense_plan(config: Config) -> Plan:
    """The plan of the same network with every kernel dense."""
    return plan_by_rules(dataclasses.replace(config, lowrank=LowRankConfig(method="none")))


def check_plan(config: Config) -> None:
    """Computes nothing.

    Raises:
      ConfigError: the model cannot be built, trained or evaluated on these inputs, its outputs are not what the objective
        takes, a rule does not fit it, no network fits the budget, or the inputs of a layer cannot be measured.
    """
    plan, budget = plan_by_rules(config), budget_arguments(config)
    if budget:
        with _named("lowrank.budget"):
            check_budget(least_bounded(plan), **dict(budget))
    if config.lowrank.moment_batches:
        # To choose ranks after a warm-up, the inputs of all kernels that are open to it are measured.
        _check_captured(*_relevant(config), plan.opened() if forecast(config) else plan)


@functools.cache
def _check_captured(config: Config, _dataset: Dataset, plan: Plan) -> None:
    """Raises ConfigError now, rather than at the end of a dense warm-up."""
    network, one = config.build_network(), images_like(config)
    variables = jax.eval_shape(lambda images: network.init(jax.random.key(0), images), one)
    variables = {**variables, "params": nn.meta.unbox(variables["params"])}
    rngs = {"dropout": jax.random.key(0)}
    try:
        inputs.check_captured(network.module, variables, one, plan, rngs=rngs, **network.flags(train=True))
    except ValueError as error:
        line = f"{first_line(error)}; or set it to 0"
        raise ConfigError("config", [f"lowrank.moment_batches: {line}"]) from error


def allocated(config: Config, plan: Plan, **values: Any) -> Plan:
    """The ranks that the config's budget affords and its energies ask for, of a plan by its rules; `values` as in `allocate`.

    Raises:
      ConfigError: the budget is impossible, or the values are of no use.
    """
    with _named("lowrank.budget" if has_budget(config) else "lowrank.rules"):
        return allocate(plan, **dict(budget_arguments(config)), **values)


@functools.cache
def _allocated(plan: Plan, _normalized: tuple[str | None, ...], *budget: tuple[str, Any]) -> Plan:
    # Equal plans may differ in what follows their kernels.
    with _named("lowrank.budget"):
        return allocate(plan, **dict(budget))


def budget_arguments(config: Config) -> tuple[tuple[str, Any], ...]:
    """The arguments of `allocate`; none without a budget."""
    low = config.lowrank
    budget = low.budget
    if not budget.amounts or low.method == "none":
        return ()
    arguments = {**budget.amounts, "objective": budget.objective, "min_scale": budget.min_scale}
    arguments["itemsize"] = jnp.dtype(config.model.dtype if "seconds" in budget.amounts else jnp.float32).itemsize
    if "seconds" in budget.amounts:
        batch = budget.batch or config.batch_size // config.optim.accumulate
        arguments |= {"chip": CHIPS[budget.chip or ""], "batch": batch, "rest": budget.rest}
    return tuple(arguments.items())


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError("config", [f"{key}: {line}" for line in str(error).splitlines()]) from None


def plan_by_rules(config: Config) -> Plan:
    """The plan before a budget, if there is one: the ranks of the rules then are bounds.  Computes nothing; results are cached.

    Raises:
      ConfigError: see `check_plan`.
    """
    return _make_plan(*_relevant(config))


def _relevant(config: Config) -> tuple[Config, Dataset]:
    """All that a plan depends on: data of the user's own may have changed."""
    relevant = Config(
        model=config.model,
        dataset=config.dataset,
        lowrank=config.lowrank,
        objective=config.objective,
        optim=OptimConfig(label_smoothing=config.optim.label_smoothing),
        eval=EvalConfig(best=config.eval.best),
        code_dir=config.code_dir,
    )
    return relevant, config.description


@functools.cache
def _make_plan(config: Config, dataset: Dataset) -> Plan:
    # Two examples, and the one stream of randomness that training has: what fails in a batch is found here.
    two = jax.ShapeDtypeStruct((2, *dataset.image_shape), jnp.float32)
    rngs = {"dropout": jax.random.key(0)}
    network = _network(config)
    try:
        also = [network.flags(train=True)]
        plan = plan_model(network.module, two, config.lowrank.to_rules(), rngs=rngs, also=also, **network.flags(train=False))
        traced = network.trace(images_like(config), two)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's model may raise, SystemExit too
        raise ConfigError("config", [f"model or lowrank: {line}{network.hint(line)}" for line in _lines(error)]) from error
    if not plan.dense_params:
        raise ConfigError("config", [f"model: {config.model.name} has no parameters"])
    for name, leaf in named_leaves(nn.meta.unbox(traced.params)).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ConfigError(
                "config", [f"model: the parameter {name!r} is {leaf.dtype}; only floating-point numbers are trained"]
            )
    if problems := traced.problems or output_problems(config, traced.training, traced.evaluation):
        raise ConfigError("config", problems)
    return plan


def _network(config: Config) -> Network:
    try:
        network = config.build_network()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError("config", [f"model: {line}" for line in _lines(error)]) from error
    if complaint := network.problem():
        raise ConfigError("config", [f"model.train_argument: {complaint}"])
    return network


def images_like(config: Config) -> jax.ShapeDtypeStruct:
    """The shape of one image, `[1, height, width, channels]`, for tracing a model."""
    return jax.ShapeDtypeStruct((1, *config.description.image_shape), jnp.float32)


def _lines(error: BaseException) -> list[str]:
    """An error in one line; our own ValueErrors have a line for each problem."""
    first = first_line(error)
    ours = isinstance(error, ValueError) and first.startswith(("rule ", "setting "))
    return str(error).splitlines() if ours else [first[:300]]
