"""What the processes agree on, with votes that the devices of one process carry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.experiment.hosts.sharding import make_mesh
from lowrank_jax.experiment.hosts.votes import FAIL, GO_ON, LAG, STOP, Votes, split


@pytest.fixture
def votes(monkeypatch):
    """Of a process that is not alone; it wants to stop once `wishes` is not empty."""
    wishes = []
    monkeypatch.setattr("lowrank_jax.experiment.hosts.votes.spans_processes", lambda mesh: True)
    return Votes(make_mesh(), lambda: bool(wishes)), wishes


@jax.jit
def step(batch):
    rest, vote = split(batch)
    return {"loss": rest["image"].sum(), **vote}


def train(votes, *, failed=False):
    batch = votes.cast({"image": jnp.ones(8)}, failed=failed)
    (metrics,) = votes.count(step(batch))
    assert metrics.keys() == {"loss"} and metrics["loss"] == 8  # nobody sees the vote
    return votes.outcome


def test_a_wish_to_stop_is_known_after_the_lag(votes):
    votes, wishes = votes
    assert [train(votes) for _ in range(4)] == [GO_ON] * 4
    wishes.append("stop")
    assert [train(votes) for _ in range(LAG + 1)] == [GO_ON] * LAG + [STOP]


def test_a_failure_outweighs_a_stop_and_is_known_at_once_where_it_matters(votes):
    votes, wishes = votes
    wishes.append("stop")
    train(votes)
    train(votes, failed=True)
    assert votes.outcome == GO_ON
    assert votes.settle() == FAIL == votes.outcome


def test_the_largest_vote_of_all_counts():
    batch = {"image": np.ones(8, np.float32), "vote": np.array([0, 0, 1, 0, 2, 0, 0, 0], np.int32)}
    assert step(batch)["vote"] == FAIL


def test_a_process_that_is_alone_is_asked_and_sends_nothing():
    wishes = []
    votes = Votes(make_mesh(), lambda: bool(wishes))
    batch = {"image": np.ones(8, np.float32)}
    assert votes.cast(batch, failed=True) is batch and votes.outcome == GO_ON
    assert votes.count({"loss": 1.0}, {"loss": 2.0}) == [{"loss": 1.0}, {"loss": 2.0}]
    wishes.append("stop")
    assert votes.outcome == votes.settle() == STOP
