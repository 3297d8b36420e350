"""Config files: loaded, overridden, and parsed strictly."""

from lowrank_jax.experiment.config.files import ConfigError, default, legal_keys, load, overridden, override, to_dict
from lowrank_jax.experiment.config.parse import parse, read
from lowrank_jax.experiment.config.plan import images_like, make_plan
from lowrank_jax.experiment.config.schema import Config

__all__ = [
    "Config",
    "ConfigError",
    "default",
    "images_like",
    "legal_keys",
    "load",
    "make_plan",
    "overridden",
    "override",
    "parse",
    "read",
    "to_dict",
]
