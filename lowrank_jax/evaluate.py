"""Exact classification metrics over a whole split."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank_jax import experiment as experiments
from lowrank_jax.checkpoint import CheckpointError, Checkpoints
from lowrank_jax.data import datasets
from lowrank_jax.data.datasets import Arrays
from lowrank_jax.data.pipeline import Shard, eval_batches
from lowrank_jax.plans import align, count
from lowrank_jax.schema import MeshConfig
from lowrank_jax.sharding import put_batch
from lowrank_jax.workdir import Workdir


class Interrupted(Exception):
    """A stop was asked for."""


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    params: Any,
    batch_stats: Any,
    arrays: Arrays,
    *,
    batch_size: int,
    mesh: Mesh,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """`top1`, `top5`, `loss` and `examples` over every example once, whatever the batch size.

    Raises:
      Interrupted: `stop_requested` became true on the way.
    """
    shard = Shard(jax.process_index(), jax.process_count())
    sums: list[dict[str, jax.Array]] = []
    for batch in eval_batches(arrays, batch_size, shard):
        if stop_requested():
            raise Interrupted
        sums.append(eval_step(params, batch_stats, put_batch(batch, mesh)))
        if len(sums) > 2:  # never far ahead of the devices
            jax.block_until_ready(sums[-3])
    # In float64 on the host: a float32 sum over 50,000 losses would lose digits.
    totals = {name: sum(float(part[name]) for part in jax.device_get(sums)) for name in sums[0]}
    examples = totals.pop("count")
    assert examples == len(arrays), f"evaluated {examples} of {len(arrays)} examples"
    return {**{name: total / examples for name, total in totals.items()}, "examples": int(examples)}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `lowrank evaluate`.

    Attributes:
      split: what was evaluated.
      step: the checkpoint's.
      metrics: from `evaluate`.
      params, dense_params: of the network, and of its dense twin.
      damaged: newer steps that could not be used, each with the reason.
    """

    split: str
    step: int
    metrics: dict[str, float]
    params: int
    dense_params: int
    damaged: dict[int, str]

    def table(self) -> str:
        """Aligned text: a header and a row."""
        lines = [f"checkpoint {step} is damaged ({reason})" for step, reason in self.damaged.items()]
        header = ["split", "examples", "top1", "top5", "loss", "step", "params", "dense params"]
        row = [self.split, f"{self.metrics['examples']:,}"]
        row += [f"{self.metrics[name]:.4f}" for name in ("top1", "top5", "loss")]
        row += [str(self.step), count(self.params), count(self.dense_params)]
        return "\n".join([*lines, align([header, row])])

    def json(self) -> str:
        """One object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def evaluate_workdir(
    workdir: str, *, step: str = "latest", split: str | None = None, data_dir: str | None = None
) -> Evaluation:
    """Evaluates a checkpoint of a run; the run's own files are left as they are.

    Args:
      workdir: of the run.
      step: `latest`, `best` or a number.
      split: such as "test" or "train[:1000]"; None for the run's own.
      data_dir: where the data is; None for where it was in training.

    Raises:
      WorkdirError, ConfigError, DataError, CheckpointError: it cannot be done; the message says why.
    """
    from lowrank_jax import config as configs

    folder = Workdir(workdir)
    config = configs.parse(folder.read_config(), source=f"{workdir}/config.json", devices=None)
    config = dataclasses.replace(config, mesh=MeshConfig())
    split = split or config.dataset.eval_split
    experiment = experiments.build(config, workdir)
    try:
        arrays = datasets.load(experiment.dataset, split, data_dir or config.dataset.data_dir)
    except ValueError as error:
        raise configs.ConfigError("--split", [str(error)]) from None

    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        wanted = _choose(checkpoints, step)
        target = {"params": experiment.shapes.params, "batch_stats": experiment.shapes.batch_stats}
        restored = checkpoints.restore(target, newest=wanted)
    assert restored is not None
    if step != "latest" and restored.damaged:
        raise CheckpointError(f"checkpoint {wanted} is damaged: {restored.damaged[wanted]}")
    devices = jax.device_count()
    metrics = evaluate(
        experiment.jit_eval_step(),
        restored.state["params"],
        restored.state["batch_stats"],
        arrays,
        batch_size=-(-config.eval.batch_size // devices) * devices,
        mesh=experiment.mesh,
    )
    return Evaluation(split, restored.step, metrics, experiment.plan.params, experiment.plan.dense_params, restored.damaged)


def _choose(checkpoints: Checkpoints, step: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.directory} has no checkpoints yet")
    if step == "latest":
        return steps[-1]
    if step == "best":
        best = checkpoints.best()
        if best is None:
            raise CheckpointError(f"{checkpoints.directory}: no checkpoint was evaluated, so none is best; there are {steps}")
        return best
    if not (step.isascii() and step.isdecimal()) or int(step) not in steps:
        raise CheckpointError(f"{checkpoints.directory} has no step {step}; there are {steps} (or say latest, best)")
    return int(step)
