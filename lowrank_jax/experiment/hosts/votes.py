"""How the processes of a run agree on when to stop, at no cost: a word of each travels with its part of a batch.

The compiled step returns the largest word of all processes beside its other results.  Since every process reads the results
of a step when it has sent off two more, all of them know at the same step, and none has to ask.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GO_ON, STOP, FAIL = 0, 1, 2
LAG = 2  # steps between that of a word and the moment it is known
_WORD = "word"


class Votes:
    """What the processes want to happen next.  A process that is alone is asked whenever it matters, and sends no words.

    Args:
      mesh: the devices.
      stop_requested: whether this process wants to stop.
    """

    def __init__(self, mesh: Mesh, stop_requested: Callable[[], bool]):
        self.shared = spans_processes(mesh)
        self._mesh, self._stop_requested = mesh, stop_requested
        self._words: dict[int, jax.Array] = {}
        self._in_flight: collections.deque[jax.Array] = collections.deque()
        self._known = GO_ON

    @property
    def outcome(self) -> int:
        """The same in all processes that have sent off the same steps."""
        return self._known if self.shared else self._wish()

    def cast(self, batch: dict[str, jax.Array], *, failed: bool = False) -> dict[str, jax.Array]:
        """The batch with this process's word."""
        if not self.shared:
            return batch
        word = FAIL if failed else self._wish()
        if word not in self._words:
            shape = word_shape(self._mesh)
            self._words[word] = jax.make_array_from_callback(shape.shape, shape.sharding, lambda _: np.full(1, word, np.int32))
        return {**batch, _WORD: self._words[word]}

    def count(self, *results: dict[str, Any]) -> list[dict[str, Any]]:
        """Takes the word from the results of the steps that took a batch, and reads that of `LAG` batches before.

        Returns:
          The results without it.
        """
        if self.shared:
            self._in_flight.append(results[0][_WORD])
            if len(self._in_flight) > LAG:
                self._read()
        return [{name: value for name, value in part.items() if name != _WORD} for part in results]

    def settle(self) -> int:
        """The outcome of all words so far."""
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


def word_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """One word for each device: copies on several processes could not differ."""
    return jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def batch_shapes(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What `Votes.cast` adds to a batch."""
    return {_WORD: word_shape(mesh)} if spans_processes(mesh) else {}


def split(batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Inside a step: the batch without words, and what the step has to return beside its results."""
    rest = {name: value for name, value in batch.items() if name != _WORD}
    return rest, ({_WORD: batch[_WORD].max()} if _WORD in batch else {})
