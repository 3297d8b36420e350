"""Means of the loss and the metrics over a whole split, exact whatever the batch size."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lowrank_jax.experiment.best import Best
from lowrank_jax.experiment.data.base import DataError, Split
from lowrank_jax.experiment.data.pipeline import EvalBatches, shard_of
from lowrank_jax.experiment.hosts.processes import OtherFailed
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.hosts.votes import FAIL, STOP, Votes
from lowrank_jax.experiment.training.step import OF

Evaluated = dict[str, dict[str, float]]
"""Metrics by name, of every set of weights or split that was evaluated."""


Tally = dict[str, np.ndarray]
"""What `step.tally` counts, summed over a split."""


NOBODY = float("nan")
"""What a metric is that counts none of the examples; told by `is` from others that are no number."""


class Interrupted(Exception):
    """A stop was requested."""


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    variables: dict[str, dict[str, Any]],
    examples: Split,
    *,
    batch_size: int,
    mesh: Mesh,
    stop_requested: Callable[[], bool] = lambda: False,
    waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    tallies: dict[str, Tally] | None = None,
) -> Evaluated:
    """The means of the loss and the metrics over every example once, whatever the batch size.

    `examples` is their number and `undecodable` the number of images that could not be decoded, if there are any.

    Args:
      eval_step: from `step.make_eval_step`.
      variables: sets of a model's variables by name, from `state.evaluated_variables`; evaluated in one pass over the data.
      examples: what to evaluate on.
      batch_size: over all devices.
      mesh: the devices.
      stop_requested: called before every batch.
      waiting: entered while a batch is waited for.
      tallies: receives, for every set of variables, the sums of what the step counts in its `tally`, if it does.

    Raises:
      DataError: more images do not decode than `dataset.max_undecodable` allows.
      Interrupted: `stop_requested` returned True, in this process or another.
      OtherFailed: another process could not read its part.
    """
    batches, votes = EvalBatches(examples, batch_size, shard_of(mesh)), Votes(mesh, stop_requested)
    reader, failure = iter(batches), None
    sums: list[dict[str, dict[str, jax.Array]]] = []
    tallied: list[dict[str, jax.Array]] = [{} for _ in variables]
    for _ in range(len(batches)):
        if votes.outcome == STOP:
            raise Interrupted
        if votes.outcome == FAIL:
            break
        try:
            with waiting():
                batch = batches.blank() if failure else next(reader)
        except DataError as error:
            if not votes.shared:
                raise
            batch, failure = batches.blank(), error  # the others count on this process until they know
        placed = votes.cast(put_batch(batch, mesh), failed=failure is not None)
        results = votes.count(*(eval_step(part, placed) for part in variables.values()))
        tallied = [_added(so_far, result.pop("tally", {})) for so_far, result in zip(tallied, results, strict=True)]
        sums.append(dict(zip(variables, results, strict=True)))
        if len(sums) > 2:  # never far ahead of the devices
            jax.block_until_ready(sums[-3])
    if votes.settle() == FAIL:
        raise failure or OtherFailed
    if tallies is not None:
        tallies |= dict(zip(variables, jax.device_get(tallied), strict=True))
    parts = jax.device_get(sums)
    return {name: _means([part[name] for part in parts], examples, votes.shared) for name in variables}


def _added(sums: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Added up on the devices: of a thousand classes, a matrix for every batch would fill them."""
    return {name: sums[name] + value if name in sums else value for name, value in more.items()}


def score(evaluated: Evaluated, best: Best) -> float | None:
    """What runs and checkpoints are chosen by, larger is better: on the held-out split, or `eval_split` if none is held out.

    None if the metric counts nobody.
    """
    value = evaluated.get("valid", evaluated["eval"])[best.metric]
    return best.score(value) if math.isfinite(value) else None


def _means(sums: list[dict[str, Any]], examples: Split, shared: bool) -> dict[str, float]:
    """Means over the examples that could be read, from the sums of every batch."""
    # In float64 on the host: a float32 sum over 50,000 losses would lose digits.
    totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    seen = int(totals.pop("count"))
    skipped = len(examples) - seen
    # Other processes know of their own undecodable images only.
    known = len(examples.undecodable)
    assert skipped == known or (shared and skipped > known), f"evaluated {seen} of {len(examples)} examples"
    if not seen:
        raise DataError("no image of the evaluated split could be decoded")
    means = {name: _ratio(total, totals.get(f"{name}{OF}", seen)) for name, total in totals.items() if not name.endswith(OF)}
    return {**means, "examples": seen, **({"undecodable": skipped} if skipped else {})}


def _ratio(total: float, count: float) -> float:
    return total / count if count else NOBODY
