"""What a config file imports: `default()` to change, `load()` to begin from another file."""

from lowrank_jax.experiment.config.files import default, load

__all__ = ["default", "load"]
