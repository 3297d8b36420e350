"""The metrics of the steps since the last log."""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


class Diverged(Exception):
    """The loss or the gradient is not finite."""


class Window:
    """The metrics of the steps since the last log; they stay on the devices until they are needed."""

    def __init__(self, batch_size: int, step: int, rows: list[dict[str, float]]):
        self._batch_size = batch_size
        self._metrics: list[dict[str, Any]] = list(rows)  # of an earlier process, when resuming within a window
        self._in_flight: collections.deque[jax.Array] = collections.deque()
        self._first = step - len(rows) + 1
        self._timed = 0
        self._begin = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds a step.  Waits for the last but one, so that the devices have work and their queue stays short."""
        self._first = self._first if self._metrics else step
        self._metrics.append(metrics)
        self._timed += 1
        self._in_flight.append(metrics["loss"])
        if len(self._in_flight) > 2:
            self._in_flight.popleft().block_until_ready()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count as training time."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def check(self, last_good: int | None) -> list[dict[str, float]]:
        """Fetches the metrics of each step.

        Raises:
          Diverged: one of them is not finite.
        """
        rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(self._metrics)]
        for i, row in enumerate(rows):
            loss, norm, lr = row["loss"], row["grad_norm"], row["lr"]
            if not np.isfinite([loss, norm]).all():
                before = f"Last good checkpoint: {last_good}." if last_good is not None else "There is no checkpoint yet."
                culprit = f"gradient norm is {norm:g}" if np.isfinite(loss) else f"loss is {loss:g}"
                raise Diverged(
                    f"{culprit} at step {self._first + i} (learning rate {lr:.3g}, loss {loss:.3g}, gradient norm {norm:.3g})."
                    f" {before} Lower optim.lr or set optim.clip_norm."
                )
        return rows

    def summary(self, last_good: int | None) -> dict[str, float]:
        """Means over the window; the next one begins."""
        rows = self.check(last_good)
        scalars = {f"train/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}
        scalars["train/images_per_second"] = self._batch_size * self._timed / (time.perf_counter() - self._begin)
        self._metrics, self._timed, self._begin = [], 0, time.perf_counter()
        return scalars
