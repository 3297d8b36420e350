"""How the processes of a run agree on when to stop, at no cost: each adds a vote to its part of a batch.

The compiled step returns the largest vote of all processes with its other results.  Every process reads the results of a step
after it has dispatched two more, so all of them know the outcome at the same step, without extra communication.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GO_ON, STOP, FAIL = 0, 1, 2
LAG = 2  # steps between casting a vote and reading the outcome
_VOTE = "vote"


class Votes:
    """What the processes want to happen next.  A process that is alone casts no votes; its wish is the outcome.

    Args:
      mesh: the devices.
      stop_requested: whether this process wants to stop.
    """

    def __init__(self, mesh: Mesh, stop_requested: Callable[[], bool]):
        self.shared = spans_processes(mesh)
        self._mesh, self._stop_requested = mesh, stop_requested
        self._votes: dict[int, jax.Array] = {}
        self._in_flight: collections.deque[jax.Array] = collections.deque()
        self._known = GO_ON

    @property
    def outcome(self) -> int:
        """GO_ON, STOP or FAIL; the same in all processes that have dispatched the same steps."""
        return self._known if self.shared else self._wish()

    def cast(self, batch: dict[str, jax.Array], *, failed: bool = False) -> dict[str, jax.Array]:
        """The batch with this process's vote."""
        if not self.shared:
            return batch
        vote = FAIL if failed else self._wish()
        if vote not in self._votes:
            shape = vote_shape(self._mesh)
            self._votes[vote] = jax.make_array_from_callback(shape.shape, shape.sharding, lambda _: np.full(1, vote, np.int32))
        return {**batch, _VOTE: self._votes[vote]}

    def count(self, *results: dict[str, Any]) -> list[dict[str, Any]]:
        """Takes the vote out of the results of the steps on one batch, and reads the one of `LAG` batches before.

        Returns:
          The results without the vote.
        """
        if self.shared:
            self._in_flight.append(results[0][_VOTE])
            if len(self._in_flight) > LAG:
                self._read()
        return [{name: value for name, value in part.items() if name != _VOTE} for part in results]

    def settle(self) -> int:
        """The outcome of all votes so far; waits for the steps that are running."""
        while self._in_flight:
            self._read()
        return self.outcome

    def _read(self) -> None:
        self._known = max(self._known, int(self._in_flight.popleft()))

    def _wish(self) -> int:
        return STOP if self._stop_requested() else GO_ON


def spans_processes(mesh: Mesh) -> bool:
    """Whether the devices belong to more than one process."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def vote_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """One vote for each device: replicated values could not differ between processes."""
    return jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def batch_shapes(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `Votes.cast` adds to a batch."""
    return {_VOTE: vote_shape(mesh)} if spans_processes(mesh) else {}


def split(batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Inside a step: the batch without votes, and what the step has to return with its results."""
    rest = {name: value for name, value in batch.items() if name != _VOTE}
    return rest, ({_VOTE: batch[_VOTE].max()} if _VOTE in batch else {})
