"""What a dense training step takes besides its kernels: without it, a budget of seconds is a fraction of the kernels' alone."""

import dataclasses

import jax.numpy as jnp

from lowrank_jax.experiment.config.plan import plan_by_rules
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.preflight.estimate import Estimate
from lowrank_jax.experiment.preflight.networks import Network
from lowrank_jax.planning.chips import CHIPS, Chip
from lowrank_jax.planning.execution import dense_seconds

_CLOSE = 0.05  # relative: no estimate is better than that


@dataclasses.dataclass(frozen=True)
class Rest:
    """The dense step of a network with a budget of seconds, of one batch on one device.

    Attributes:
      network: its name.
      step: seconds of the dense step.
      source: whose estimate that is.
      kernels: seconds of its kernels, by the cost model.
      batch: examples on a device.
      chip: as a config calls it.
      rest: what is left, as a config states it for that chip.
      missing: the settings that the config should have, without those that it has.
    """

    network: str
    step: float
    source: str
    kernels: float
    batch: int
    chip: str
    rest: float
    missing: dict[str, str]

    def __str__(self) -> str:
        step, kernels = f"{1e3 * self.step:.3g} ms ({self.source})", f"{1e3 * self.kernels:.3g} ms by the cost model"
        lead = f"lowrank.budget.seconds of {self.network}: a dense step of {self.batch} on {self.chip} takes {step}"
        if not self.rest:
            lead += f", no more than its kernels, {kernels}: there is no rest to set"
        else:
            lead += f", its kernels {kernels}"
        if not self.missing:
            return f"{lead}. The config says so."
        flags = " ".join(f"--config.{key}={value}" for key, value in self.missing.items())
        return f"{lead}. For a fraction of the whole step: {flags}"


def rest_of(network: Network, dense: Estimate, roofline: float, chip: Chip, devices: int) -> Rest | None:
    """The rest of a network's dense step; None without a budget of seconds, or where no device has a whole layer.

    Args:
      network: the low-rank one.
      dense: of its twin.
      roofline: seconds of the twin's step where the compiler's are not believed.
      chip: one device.
      devices: how many.
    """
    config = network.config
    sizes = config.mesh.sizes(devices)
    if "seconds" not in config.lowrank.budget.amounts or network.dense or sizes["model"] > 1 or dense.step is None:
        return None
    believed = dense.step.seconds
    step, source = (roofline, "roofline") if believed is None else (believed, "compiler's time")
    step /= dense.parts
    batch = max(1, config.batch_size // (sizes["data"] * sizes["fsdp"] * dense.parts))
    itemsize = jnp.dtype(config.model.dtype).itemsize
    kernels = sum(dense_seconds(kernel, chip, batch, itemsize) for kernel in plan_by_rules(config).kernels)
    # Configs name whole chips, of which a device may be one core: the cost model then takes all times to be shorter.
    rest = float(f"{max(0.0, step - kernels) * chip.flops / CHIPS[chip.name].flops:.3g}")
    return Rest(network.name, step, source, kernels, batch, chip.name, rest, _missing(config, rest, batch, chip))


def _missing(config: Config, rest: float, batch: int, chip: Chip) -> dict[str, str]:
    budget = config.lowrank.budget
    wanted = {
        "rest": None if abs(budget.rest - rest) <= _CLOSE * rest else f"{rest:g}",
        "batch": None if (budget.batch or config.batch_size // config.optim.accumulate) == batch else str(batch),
        "chip": None if budget.chip == chip.name else chip.name,
    }
    return {f"lowrank.budget.{key}": value for key, value in wanted.items() if value is not None}
