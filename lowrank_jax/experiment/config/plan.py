"""The plan of a config's model: which of its kernels are factored; and whether it can be trained and evaluated."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.objectives import output_problems
from lowrank_jax.experiment.config.schema import Config, EvalConfig, OptimConfig
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.network import Network
from lowrank_jax.linen.plan import plan as plan_model
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import Plan
from lowrank_jax.text import first_line


def make_plan(config: Config) -> Plan:
    """Decides which kernels of the model are factored. Computes nothing; results are cached.

    Raises:
      ConfigError: the model cannot be built, trained or evaluated on these inputs, its outputs are not what the objective
        takes, or a rule does not fit it.
    """
    relevant = Config(
        model=config.model,
        dataset=config.dataset,
        lowrank=config.lowrank,
        objective=config.objective,
        optim=OptimConfig(label_smoothing=config.optim.label_smoothing),
        eval=EvalConfig(best=config.eval.best),
        code_dir=config.code_dir,
    )
    return _make_plan(relevant, config.description)  # all that it depends on: data of the user's own may have changed


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
