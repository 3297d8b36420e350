import pytest

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.preflight.networks import Network, check_all, families, named
from tests import running


def test_every_network_has_a_dense_twin():
    configs = {
        "a": running.config(lowrank__scale=0.1),
        "b": running.config(lowrank__scale=0.2, seed=1),
        "c": running.config(batch_size=64),
        "d": running.config(batch_size=64, lowrank__method="none"),
    }
    one, other = families([Network(name, config) for name, config in configs.items()])
    assert [network.name for network in one.others] == ["a", "b"] and [network.name for network in other.others] == ["c"]
    assert one.dense.name == "dense twin of a" and one.dense.dense and not one.requested
    assert other.dense.name == "d" and other.requested
    assert one.dense.config.model == configs["a"].model


def test_a_self_guided_network_comes_before_the_one_that_it_becomes():
    (family,) = families([Network("a", running.config(lowrank__self_guided="10 steps")), Network("b", running.config())])
    assert [(network.name, network.guided_steps) for network in family.others] == [("a, self-guided", 10), ("a", 0), ("b", 0)]


def test_no_dense_network_that_was_asked_for_is_left_out():
    dense = [Network(f"seed={seed}", running.config(lowrank__method="none", seed=seed)) for seed in (1, 2)]
    (family,) = families([*dense, Network("low", running.config(seed=1))])
    assert (family.dense.name, family.requested, [network.name for network in family.others]) == (
        "seed=1",
        True,
        ["low", "seed=2"],
    )


def test_networks_are_checked_for_the_devices_of_the_slice():
    networks = [Network("a", running.config()), Network("b", running.config(batch_size=40))]
    with pytest.raises(ConfigError) as caught:
        check_all(networks, "config", devices=64)
    assert [problem.split("; must")[0] for problem in caught.value.problems] == ["batch_size: 32", "batch_size: 40"]
    assert caught.value.problems[1].endswith("(in b)")
    assert check_all(networks, "config", devices=8) == networks


def test_the_dense_phase_of_a_warm_up_has_to_fit_too():
    networks = [named(running.config(lowrank__budget__macs=0.5, lowrank__dense_warmup="5 steps")), named(running.config())]
    (family,) = families(networks)
    assert (family.dense.name, family.requested) == ("dense warm-up", True)
    (family,) = families(networks[1:])
    assert (family.dense.name, family.requested) == ("dense twin", False)


def test_a_network_is_called_by_its_size():
    sizes = {
        "scale=0.25": {},
        "rank=3": {"lowrank__rank": 3, "lowrank__scale": None},
        "dense": {"lowrank__method": "none"},
        "budget.params=0.5": {"lowrank__budget__params": 0.5},
        "budget.params=3000000,budget.seconds=0.9": {
            "lowrank__budget__params": 3_000_000,
            "lowrank__budget__seconds": 0.9,
            "lowrank__budget__min_scale": 0.0,
            "lowrank__budget__chip": "v5e",
            "model__kwargs": {"widths": (2048, 1024)},
        },
    }
    assert {named(running.config(**changes)).name for changes in sizes.values()} == set(sizes)
    assert all(named(running.config(**changes)).name == name for name, changes in sizes.items())
