"""Work directories written by hand, so that every number in them is known."""

import pathlib
from typing import Any

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running


def result(top1: float = 0.5, valid: dict[str, float] | None = None, params: int = 1000) -> dict[str, Any]:
    """The contents of result.json, as far as they are compared."""
    sizes = {"params": params, "macs": 2 * params, "seconds": 1.5, "versions": {"jax": "1"}}
    return {**sizes, "eval": {"top1": top1, "top5": 1.0, "loss": 0.5}, "valid": valid}


def make(
    home: pathlib.Path,
    name: str,
    *,
    top1: float | None = None,
    raw: float | None = None,
    valid: float | None = None,
    failure: str | None = None,
    loss: float = 1.0,
    ranks: dict[str, int | None] | None = None,
    **changes: Any,
) -> None:
    """A work directory as a run leaves it; without top1, one that has not finished."""
    folder = Workdir(home / name)
    folder.claim(configs.to_dict(configs.read(configs.default(), running.settings(**changes))))
    folder.metrics.append({"step": 10, "train/loss": loss, "train/images_per_second": 10.0})
    folder.metrics.append({"step": 20, "train/loss": loss / 2, "train/images_per_second": 100.0})
    if ranks is not None:
        entries = {name: rank and {"rank": rank, "rows": [0], "execution": None} for name, rank in ranks.items()}
        folder.write_json("ranks.json", {"step": 0, "ranks": entries})
    if failure:
        folder.note_failure(diverged=True, reason=failure)
    if top1 is not None:
        folder.metrics.append({"step": 20, "eval/top1": top1, "train/images_per_second": None})
        method = changes.get("lowrank__method", "kernel_projection")
        share = changes.get("lowrank__budget__params", changes.get("lowrank__scale")) or 0.25
        params = 1000 if method == "none" else share if isinstance(share, int) else int(1000 * share)
        held_out = {"top1": valid, "loss": 1 - valid} if valid else None
        averaged = raw and {"top1": raw, "top5": 1.0, "loss": 0.5}
        folder.write_json("result.json", {**result(top1, held_out, params), "eval_raw": averaged})
