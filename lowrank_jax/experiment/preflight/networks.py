"""The networks of a preflight, each next to its dense twin."""

import dataclasses
from collections.abc import Sequence

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import Config, LowRankConfig


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to estimate.

    Attributes:
      name: of its row in the table.
      config: parsed.
      guided_steps: of self-guided training, whose network this is; 0 for the one that training ends with.
    """

    name: str
    config: Config
    guided_steps: int = 0

    @property
    def dense(self) -> bool:
        return self.config.lowrank.method == "none"


@dataclasses.dataclass(frozen=True)
class Family:
    """A dense network, and others that differ from it only in their factors or in what no program depends on.

    Attributes:
      dense: the network that the others are compared with, and that those with a dense warm-up are at first.
      requested: whether the user asked for it, or for one that is it at first.
      others: the low-rank ones first.
    """

    dense: Network
    requested: bool
    others: tuple[Network, ...]


def families(networks: Sequence[Network]) -> list[Family]:
    """Every low-rank network under its dense twin, which is added if nobody asked for it."""
    twins: dict[Config, list[Network]] = {}
    for network in networks:
        twins.setdefault(_dense_twin(network.config), []).append(network)
    found = []
    for members in twins.values():
        asked = [network for network in members if network.dense]
        low_rank = [phase for network in members if not network.dense for phase in _phases(network)]
        others = (*low_rank, *asked[1:])
        first = any(network.config.starts_dense for network in members)
        name = "dense warm-up" if first else "dense twin"
        name = name if len(twins) == 1 else f"{name} of {members[0].name}"
        dense = asked[0] if asked else Network(name, _dense_twin(members[0].config))
        found.append(Family(dense, bool(asked) or first, others))
    return found


def _phases(network: Network) -> list[Network]:
    """A low-rank network, before it that of self-guided training, which takes more memory."""
    steps = network.config.guided_steps
    return [*([Network(f"{network.name}, self-guided", network.config, steps)] if steps else []), network]


def named(config: Config) -> Network:
    """A network that is called by its size."""
    low = config.lowrank
    if low.method == "none":
        return Network("dense", config)
    budgets = [f"budget.{kind}={value}" for kind, value in low.budget.amounts.items()]
    size = f"scale={low.scale:g}" if low.scale is not None else f"rank={low.rank}"
    return Network(",".join(budgets) or size, config)


def _dense_twin(config: Config) -> Config:
    """The same experiment with no kernel factored.  Without the seed: it is an argument of the programs."""
    return dataclasses.replace(config, seed=0, lowrank=LowRankConfig(method="none"))


def check(config: Config, source: str, devices: int) -> Config:
    """The config, checked for this number of devices.  Raises ConfigError if its mesh or batches do not fit them."""
    return configs.parse(configs.to_dict(config), source=source, devices=devices)


def check_all(networks: Sequence[Network], source: str, devices: int) -> list[Network]:
    """The networks, checked for this number of devices.  Raises ConfigError with all problems of all of them."""
    checked, problems = [], {}
    for network in networks:
        try:
            checked.append(Network(network.name, check(network.config, source, devices)))
        except configs.ConfigError as error:
            problems.update({problem: network.name for problem in error.problems if problem not in problems})
    if problems:
        raise configs.ConfigError(source, [f"{problem}   (in {name})" for problem, name in problems.items()])
    return checked
