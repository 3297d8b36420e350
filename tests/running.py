"""Small experiments for the tests, in this process or in one of their own."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.training.stop import StopSignal
from lowrank_jax.paths import named_leaves

ROOT = pathlib.Path(__file__).parent.parent

# Dropout, BatchNorm, augmentation and mixup are on, so that resuming has to bring all of them back.
TINY = {
    "batch_size": 32,
    "steps": 40,
    "dataset.crop_padding": 1,
    "dataset.flip": True,
    "dataset.mixup": 0.2,
    "model.name": "mlp",
    "model.kwargs": {"widths": (32, 32), "batch_norm": True, "dropout": 0.2},
    "optim.warmup": "5 steps",
    "optim.weight_decay": 1e-3,
    "optim.lr": 0.05,
    "eval.every": "1000 steps",
    "eval.batch_size": 64,
    "checkpoint.every": "10 steps",
    "checkpoint.keep": 3,
    "log.every": "10 steps",
}


def settings(**changes: Any) -> dict[str, Any]:
    """The tiny experiment's values by dotted key; `a__b=1` sets "a.b"."""
    return {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}


def config(**changes: Any) -> configs.Config:
    """The tiny experiment, parsed for the devices of this process."""
    return parsed(devices=8, **changes)


def parsed(*, devices: int, **changes: Any) -> configs.Config:
    """The tiny experiment, parsed for so many devices."""
    return configs.read(configs.default(), settings(**changes), devices=devices)


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Runs in this process whose programs are the same share them, and their first states.

    What a process compiles for itself is tested by those that start processes.
    """
    lower, jit_eval, init, store = Experiment.lower_train_step, Experiment.jit_eval_step, Experiment.init, {}

    def once(kind: str, experiment: Experiment, make: Callable[[], Any], *extra: Any) -> Any:
        config = experiment.config  # without what no program depends on; the learning rate and the seed are arguments
        parts = (
            config.batch_size,
            config.total_steps,
            config.extensions,
            config.dataset,
            config.model,
            config.lowrank,
            config.objective,
            experiment.plan,
            experiment.guided_steps,
            dict(experiment.mesh.shape),
        )
        optim = dataclasses.replace(config.optim, lr=1.0)
        key = repr((kind, parts, optim, config.init, config.eval.batch_size, config.mesh, extra))
        if key not in store:
            store[key] = make()
        return store[key]

    def shared_lower(self: Experiment) -> Any:
        compiled = once("train", self, lambda: lower(self).compile())
        return types.SimpleNamespace(compile=lambda: compiled)

    def shared_init(self: Experiment, batches: Iterable[Any] = ()) -> Any:
        state = once("init", self, lambda: init(self, batches), self.config.seed)
        return jax.tree.map(lambda leaf: leaf.copy(), state)  # a step takes its memory

    def shared_eval(self: Experiment, **options: Any) -> Any:
        return once("eval", self, lambda: jit_eval(self, **options), options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "lower_train_step", shared_lower)
        patch.setattr(Experiment, "jit_eval_step", shared_eval)
        patch.setattr(Experiment, "init", shared_init)
        yield


def arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Everything that a checkpoint of a state holds, by name."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state.saved()).items()}


def assert_same(one: TrainState, other: TrainState) -> None:
    """Bit for bit."""
    ours, theirs = arrays(one), arrays(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@contextlib.contextmanager
def dying_after(batches: int) -> Iterator[None]:
    """The training inside ends with a MemoryError that nothing catches, as it asks for the batch after so many."""
    placed = itertools.count()

    def die(*args: Any) -> Any:
        if next(placed) == batches:
            raise MemoryError
        return put_batch(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("lowrank_jax.experiment.training.loop.put_batch", die)
        yield


class Stop(StopSignal):
    """A stop that is asked for by the test, not by a signal; the signals stay pytest's."""

    def __enter__(self) -> "Stop":
        return self


def command(workdir: pathlib.Path, name: str = "train", **changes: Any) -> list[str]:
    """The command line that trains the tiny experiment from a shipped config file; by default without importing TensorFlow."""
    changes = {"log__tensorboard": False, **changes} if name == "train" else changes
    flags = [f"--config.{key}={value}" for key, value in settings(epochs=None, **changes).items()]
    file = ROOT / "configs" / "digits_resnet.py"
    # The rules of the shipped config name layers of its own network.
    flags += ["--config.lowrank.rules=()"]
    return [sys.executable, "-m", "lowrank_jax", name, f"--config={file}", f"--workdir={workdir}", *flags]


def run(arguments: list[str], *, devices: int = 1, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(arguments, env=environment(devices), capture_output=True, text=True, timeout=300, **kwargs)


class _Process(subprocess.Popen[str]):
    """One that does not outlive a test that fails, or that is ended."""

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind:
            self.kill()
        super().__exit__(kind, *rest)


def start(arguments: list[str], *, devices: int = 1, **kwargs: Any) -> subprocess.Popen[str]:
    """Starts a command; its output is one stream."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "bufsize": 1}
    return _Process(arguments, env=environment(devices), **pipes, **kwargs)


def start_all(arguments: list[str], processes: int) -> list[subprocess.Popen[str]]:
    """Starts a command as several processes of one run on loopback, each with one device: with two a process jax has hung."""
    flags = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
    return [start([*arguments, *flags, f"--process={process}"]) for process in range(processes)]


def wait_all(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each of them said until it ended; what is not said by jax itself."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return ["".join(line for line in said.splitlines(keepends=True) if "[Gloo]" not in line) for said in outputs]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = re.sub("device_count=[0-9]+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags}


FIELDS = {"step", "params", "batch_stats", "opt_state", "ema"}
"""What a checkpoint holds of a state whose model has no other collections."""


def fields_of(checkpoint: pathlib.Path) -> set[str]:
    """The fields of the state in a checkpoint."""
    tree = json.loads((checkpoint / "state" / "_METADATA").read_text())["tree_metadata"]
    return {entry["key_metadata"][0]["key"] for entry in tree.values()}


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
