"""A preflight from the networks to the table of estimates."""

import itertools
from collections.abc import Callable, Sequence

from lowrank_jax.experiment.preflight import compiler, slices
from lowrank_jax.experiment.preflight.cache import Cache
from lowrank_jax.experiment.preflight.estimate import Estimate, Estimator
from lowrank_jax.experiment.preflight.networks import Network, check_all, families
from lowrank_jax.experiment.preflight.rest import Rest, rest_of
from lowrank_jax.experiment.preflight.table import Estimates, roofline_seconds
from lowrank_jax.planning.chips import Chip, of_device


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
    return Estimates(topology, chip, len(devices), effort, rows, _rests(groups, rows, chip, len(devices)))


def _rests(
    groups: Sequence[Sequence[tuple[Network, bool]]], rows: Sequence[Sequence[Estimate]], chip: Chip, devices: int
) -> tuple[Rest, ...]:
    """Of the first network of each family that has a budget of seconds: the dense step is the same for all."""
    found = []
    for group, (dense, *_) in zip(groups, rows, strict=True):
        roofline = roofline_seconds(dense.step, chip) if dense.step else 0.0
        rests = (rest_of(network, dense, roofline, chip, devices) for network, _ in group)
        found += [rest for rest in rests if rest][:1]
    return tuple(found)
