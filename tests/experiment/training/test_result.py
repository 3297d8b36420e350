import json
import math

from lowrank_jax.experiment.training.build import build
from lowrank_jax.experiment.training.result import result_record
from tests import running

METRICS = {"bytes": 0, "crc32": 0}


def test_metrics_that_are_not_finite_are_null_in_the_result():
    evaluated = {"eval": {"loss": 1.5, "top1": 0.5, "own": math.nan}, "valid": {"loss": 2.0, "own": math.inf}}
    record = result_record(
        build(running.config()), step=40, dense_steps=0, evaluated=evaluated, best_step=None, seconds=1.0, metrics=METRICS
    )
    record = json.loads(json.dumps(record, allow_nan=False))
    assert record["eval"] == {"loss": 1.5, "top1": 0.5, "own": None}
    assert record["valid"] == {"loss": 2.0, "own": None} and record["eval_raw"] is None
