"""A preflight from the networks to the table of estimates."""

import itertools
from collections.abc import Callable, Sequence

from lowrank_jax.experiment.preflight import compiler, slices
from lowrank_jax.experiment.preflight.cache import Cache
from lowrank_jax.experiment.preflight.estimate import Estimator
from lowrank_jax.experiment.preflight.networks import Network, check_all, families
from lowrank_jax.experiment.preflight.table import Estimates
from lowrank_jax.planning.chips import of_device


def run(
    networks: Sequence[Network], topology: str, *, source: str, effort: str, cache: Cache, say: Callable[[str], None]
) -> Estimates:
    """Estimates networks and their dense twins.

    Args:
      networks: what to estimate.
      topology: of the slice, for example "v5e:4x4".
      source: the config file, which error messages name.
      effort: a key of `compiler.EFFORTS`.
      cache: of the compiler's answers.
      say: called with lines of progress.

    Raises:
      PreflightError: there is no such slice, libtpu is not installed, or the compiler failed.
      ConfigError: a network does not fit the devices of the slice.
    """
    devices = compiler.topology(topology)
    chip = of_device(devices[0])
    assert chip is not None, f"{slices.parse(topology).generation} is not in the table of chips"
    groups = [
        [(family.dense, family.requested), *((network, True) for network in family.others)]
        for family in families(check_all(networks, source, len(devices)))
    ]
    estimator = Estimator(topology, devices, chip, effort, cache, say)
    estimates = iter(estimator.estimates(list(itertools.chain(*groups))))
    rows = tuple(tuple(itertools.islice(estimates, len(group))) for group in groups)
    return Estimates(topology, chip, len(devices), effort, rows)
