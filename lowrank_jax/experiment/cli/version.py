"""`lowrank --version`."""

import importlib.metadata
import platform
from collections import Counter

import lowrank_jax
from lowrank_jax.experiment.cli import environment
from lowrank_jax.experiment.cli.output import say
from lowrank_jax.text import first_line

_PACKAGES = ("jax", "jaxlib", "flax")


def show() -> None:
    """Prints the versions at once, and the devices when they are found."""
    versions = {"lowrank_jax": lowrank_jax.__version__, "python": platform.python_version()}
    versions |= {package: _installed(package) for package in _PACKAGES}
    width = max(map(len, versions))
    say("\n".join(f"{name:{width}}  {version}" for name, version in versions.items()))
    say(f"{'devices':{width}}  {_devices()}")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    environment.hush_tpu_compiler()
    try:
        import jax

        kinds = Counter(device.device_kind for device in jax.devices())
    except (ImportError, RuntimeError, ValueError) as error:  # another process may hold them; a setting is not understood
        return f"none can be used: {first_line(error)}"
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
