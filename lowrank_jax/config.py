"""For config files: `default()` to change, `load()` to start from another file."""

from lowrank_jax.experiment.config.files import default, load

__all__ = ["default", "load"]
