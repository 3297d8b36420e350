"""One strict reading of a config file and its overrides.

A config file defines `get_config()` and returns a `ConfigDict`: `default()` with some values changed.  `parse` reads it once,
completely, into the frozen dataclasses of `schema`, and reports all that is wrong with it at the same time.
"""

from typing import Any

from ml_collections import ConfigDict

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.relations import relation_problems
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.config.typed import read_section


def parse(config: ConfigDict | dict[str, Any], *, source: str = "config", devices: int | None = None) -> Config:
    """Reads a config once and completely.

    Args:
      config: as a config file returns it, or as `to_dict` wrote it.
      source: what to call it in messages.
      devices: how many devices there are; None to leave the mesh unjudged.

    Raises:
      ConfigError: with all problems.
    """
    problems: list[str] = []
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    parsed = read_section(Config, values, "", problems)
    problems += relation_problems(parsed, devices, {problem.split(":")[0] for problem in problems})
    if problems:
        raise ConfigError(source, problems)
    return parsed
