"""Reads a config file and its overrides strictly.

A config file defines `get_config()`, which returns a `ConfigDict`: `default()` with some values changed. `parse` reads it into
the frozen dataclasses of `schema`, and reports every problem at once.
"""

from typing import Any

from ml_collections import ConfigDict

from lowrank_jax.experiment.config.contradictions import contradictions
from lowrank_jax.experiment.config.files import ConfigError, Overrides, keys_given, overridden
from lowrank_jax.experiment.config.relations import relation_problems
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.config.typed import read_section
from lowrank_jax.experiment.data.kept import look_again


def read(config: str | ConfigDict, overrides: Overrides = (), *, source: str = "", devices: int | None = None) -> Config:
    """Loads a config file, replaces some of its values by dotted key, and parses the result.

    Args:
      config: path of a config file, "file.py:argument" to call its `get_config` with the argument; or what that returned.
      overrides: values by dotted key, such as `{"optim.lr": 0.05}`, or the text that the command line takes.
      source: what to call it in messages; by default its path.
      devices: how many devices there are; None to skip the checks of the mesh.

    Raises:
      ConfigError: with all problems.
    """
    named = source or (config if isinstance(config, str) else "config")
    given = overridden(config, overrides)
    return _parsed(given, named, devices, contradictions(given, keys_given(overrides)))


def parse(config: ConfigDict | dict[str, Any], *, source: str = "config", devices: int | None = None) -> Config:
    """Reads a config completely, and checks it.

    Args:
      config: as a config file returns it, or as `to_dict` wrote it.
      source: what to call it in messages.
      devices: how many devices there are; None to skip the checks of the mesh.

    Raises:
      ConfigError: with all problems.
    """
    return _parsed(config, source, devices, [])


def _parsed(config: ConfigDict | dict[str, Any], source: str, devices: int | None, problems: list[str]) -> Config:
    """`parse`, with problems that are known already."""
    look_again()
    try:
        values = config.to_dict() if isinstance(config, ConfigDict) else config
    except TypeError:  # it sorts its keys
        raise ConfigError(source, ["a key is not text"]) from None
    parsed = read_section(Config, values, "", problems)
    problems += relation_problems(parsed, devices, {problem.split(":")[0] for problem in problems})
    if problems:
        raise ConfigError(source, problems)
    return parsed
