"""The experiment half: config files, data, training, evaluation, sweeps and reports.

From Python as from the shell:

    import lowrank_jax.experiment as lx

    config = lx.load_config("configs/digits_resnet.py", {"lowrank.scale": 0.1})
    run = lx.train(config, "runs/a")
    net = lx.restore("runs/a", step="best")
    logits = net(images)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_jax.experiment.compression import Compression
    from lowrank_jax.experiment.config.files import ConfigError
    from lowrank_jax.experiment.config.schema import Config
    from lowrank_jax.experiment.config.trust import UntrustedCode
    from lowrank_jax.experiment.data.base import DataError
    from lowrank_jax.experiment.errors import CheckpointError, UserError, WorkdirError
    from lowrank_jax.experiment.evaluation.classes import Classes
    from lowrank_jax.experiment.evaluation.predictions import Prediction
    from lowrank_jax.experiment.evaluation.results import Evaluation
    from lowrank_jax.experiment.evaluation.trained import TrainedNetwork
    from lowrank_jax.experiment.runs import Run, compress, evaluate, load_config, restore, train
    from lowrank_jax.experiment.training.log_window import Diverged

__all__ = [
    "CheckpointError",
    "Classes",
    "Compression",
    "Config",
    "ConfigError",
    "DataError",
    "Diverged",
    "Evaluation",
    "Prediction",
    "Run",
    "TrainedNetwork",
    "UntrustedCode",
    "UserError",
    "WorkdirError",
    "compress",
    "evaluate",
    "load_config",
    "restore",
    "train",
]

# Names are loaded when they are first used, as in `lowrank_jax`.  The same as above, which type checkers read.
_HOMES = {
    "CheckpointError": "errors",
    "Classes": "evaluation.classes",
    "Compression": "compression",
    "Config": "config.schema",
    "ConfigError": "config.files",
    "DataError": "data.base",
    "Diverged": "training.log_window",
    "Evaluation": "evaluation.results",
    "Prediction": "evaluation.predictions",
    "Run": "runs",
    "TrainedNetwork": "evaluation.trained",
    "UntrustedCode": "config.trust",
    "UserError": "errors",
    "WorkdirError": "errors",
    "compress": "runs",
    "evaluate": "runs",
    "load_config": "runs",
    "restore": "runs",
    "train": "runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # once is enough
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
