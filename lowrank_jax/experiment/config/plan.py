"""The plan of a config's model: which of its kernels are factored."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.linen.interception import intercept
from lowrank_jax.linen.plan import plan as plan_model
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import Plan
from lowrank_jax.text import first_line


def make_plan(config: Config) -> Plan:
    """Decides which kernels of the model are factored. Computes nothing; results are cached.

    Raises:
      ConfigError: the model cannot be built on these images, or a rule does not fit it.
    """
    config = Config(model=config.model, dataset=config.dataset, lowrank=config.lowrank)
    return _make_plan(config, config.description)  # all that it depends on: data of the user's own may have changed


@functools.cache
def _make_plan(config: Config, dataset: Dataset) -> Plan:
    outputs: list[Any] = []
    params: dict[str, Any] = {}

    def note_output(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and not context.module.path:
            outputs.append(output)
            if len(outputs) == 1:
                params.update(_dtypes(context.module.variables.get("params", {})))
        return output

    # Two images, and the one stream of randomness that training has: what fails in a batch is found here.
    images = jax.ShapeDtypeStruct((2, *dataset.image_shape), jnp.float32)
    rngs = {"dropout": jax.random.key(0)}

    try:
        model = config.build_model()
        with intercept(note_output):
            plan = plan_model(model, images, config.lowrank.to_rules(), rngs=rngs, also=[{"train": True}])
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's model may raise, SystemExit too
        raise ConfigError("config", [f"model or lowrank: {line}" for line in _lines(error)]) from error
    if not plan.dense_params:
        raise ConfigError("config", [f"model: {config.model.name} has no parameters"])
    for name, dtype in params.items():
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ConfigError("config", [f"model: the parameter {name!r} is {dtype}; only floating-point numbers are trained"])
    _check_logits(config, outputs[0])  # of the model's first call
    return plan


def _dtypes(params: Any) -> dict[str, Any]:
    """The type of every parameter, by its name."""
    return {name: leaf.dtype for name, leaf in named_leaves(nn.meta.unbox(params)).items()}


def _check_logits(config: Config, output: Any) -> None:
    """Raises ConfigError unless a model's output for two images is a logit for each class."""
    dataset, model = config.description, config.model.name
    shape = getattr(output, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2:
        found = f"{type(output).__name__}" if shape is None else f"shape {shape}"
        raise ConfigError(
            "config", [f"model: {model} returns {found} for a batch of two; expected logits [2, {dataset.num_classes}]"]
        )
    if shape[1] != dataset.num_classes:
        raise ConfigError(
            "config", [f"model: {model} returns {shape[1]} logits; {dataset.name} has {dataset.num_classes} classes"]
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise ConfigError("config", [f"model: {model} returns {output.dtype}; logits must be floating-point numbers"])


def images_like(config: Config) -> jax.ShapeDtypeStruct:
    """The shape of one image, `[1, height, width, channels]`, for tracing a model."""
    return jax.ShapeDtypeStruct((1, *config.description.image_shape), jnp.float32)


def _lines(error: BaseException) -> list[str]:
    """An error in one line; our own ValueErrors have a line for each problem."""
    first = first_line(error)
    ours = isinstance(error, ValueError) and first.startswith(("rule ", "setting "))
    return str(error).splitlines() if ours else [first[:300]]
