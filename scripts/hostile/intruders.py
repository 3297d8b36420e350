"""Data that would become code, markup or a file elsewhere."""

import json
import os
from pathlib import Path

from scripts.hostile.harness import Ended, Kind, Place, refused, tidy

KIND = Kind("intruders")

_PAYLOAD = """
import pathlib
pathlib.Path({ran!r}).touch()
from lowrank_jax.models import MLP as Model
factory = lambda **kwargs: Model(**kwargs)
other = lambda *args, **kwargs: pathlib.Path({ran!r}).touch()
"""


def _naming(place: Place, changes: dict[str, object]) -> Path:
    """A run whose config names code, and that code beside it, which leaves a file where it runs."""
    run = place.copy("finished")
    config = json.loads((run / "config.json").read_text())
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    (run / "config.json").write_text(json.dumps(config))
    (place.path / "payload.py").write_text(_PAYLOAD.format(ran=str(place.path / "ran")))
    return run


def _evaluate(place: Place, *arguments: object) -> Ended:
    """Evaluates with the current folder on Python's path, as `python -m` has it."""
    path = os.pathsep.join([str(place.package.folder), str(place.path)])
    return place.fresh("evaluate", *arguments, env={"PYTHONPATH": path})


def _nothing_ran(place: Place) -> None:
    assert not (place.path / "ran").exists(), "the code ran"


@KIND.attempts(
    {
        "a model": {"model.name": "payload:Model"},
        "a factory": {"model.name": "payload:factory"},
        "a loss": {"objective.loss": "payload:other"},
        "a metric": {"objective.metrics": ["top1", "payload:other"]},
        "a metric alone": {"objective.metrics": "payload:other"},
        "a list of models": {"model.name": ["payload:Model"]},
        "a module of the current folder's run": {"model.name": "run.payload:Model"},
        "a package that installs": {"model.name": "setuptools:setup", "model.kwargs": {"name": "x", "script_args": ["bdist"]}},
        "a command": {"model.name": "os:system", "model.kwargs": {"command": "touch ran"}},
        "a module with dots": {"model.name": "lowrank_jax.models.mlp:nn.Module.__subclasses__"},
        "our command line": {"model.name": "lowrank_jax.experiment.cli.commands:main"},
        "our importer": {"model.name": "lowrank_jax.named_code:import_attribute"},
        "our way to it": {"model.name": "lowrank_jax.models:build", "model.kwargs": {"name": "payload:Model"}},
        "our writer": {"objective.loss": "lowrank_jax.experiment.workdir.files:write"},
        "a relative name": {"model.name": ".payload:Model"},
        "a path": {"model.name": "../payload:Model"},
        "a name with spaces": {"model.name": " payload:Model"},
        "several": {"model.name": "payload:Model", "objective.loss": "payload:other"},
    }
)
def a_config_json_that_names(place: Place, changes: dict[str, object]) -> None:
    run = _naming(place, changes)
    (run / "payload.py").write_text((place.path / "payload.py").read_text())
    for flags in ((), ("--watch",), ("--trust-code=another:Name",)):
        ended = refused(_evaluate(place, f"--workdir={run}", *flags))
        _nothing_ran(place)
        if str(next(iter(changes.values()))).startswith("payload"):
            assert "--trust-code=payload:" in ended.err, ended


@KIND.attempts({"always": ("--trust-code",), "by name": ("--trust-code=run.payload:Model",)})
def code_inside_of_a_work_directory_that_is_trusted(place: Place, *flags: str) -> None:
    run = _naming(place, {"model.name": "run.payload:Model"})
    (place.path / "payload.py").rename(run / "payload.py")
    refused(_evaluate(place, f"--workdir={run}", *flags))
    _nothing_ran(place)


@KIND.attempts({"train": "train", "report": "report", "sweep": "sweep"})
def a_config_json_that_another_command_finds(place: Place, command: str) -> None:
    run = _naming(place, {"model.name": "payload:Model", "objective.loss": "payload:other"})
    if command == "report":
        tidy(place.lowrank("report", run, f"--out={place.path / 'out'}"), 0, 2)
    elif command == "train":
        refused(place.train(run), "belongs to another experiment")
    else:
        config = f"--config={place.package.folder}/configs/digits_resnet.py"
        flags = ["--config.epochs=None", "--config.steps=120", f"--workdir={place.path}", "--sweep=seed=0"]
        run.rename(place.path / "seed=0")
        refused(place.lowrank("sweep", config, *flags), "belongs to another experiment")
    _nothing_ran(place)
