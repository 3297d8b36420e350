"""Small experiments for the tests, in this process or in one of their own."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any

from lowrank_jax.experiment import config as configs

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


def command(workdir: pathlib.Path, name: str = "train", **changes: Any) -> list[str]:
    """The command line that trains the tiny experiment from a shipped config file."""
    flags = [f"--config.{key}={value}" for key, value in settings(epochs=None, **changes).items()]
    file = ROOT / "configs" / "digits_resnet.py"
    # The rules of the shipped config name layers of its own network.
    flags += ["--config.lowrank.rules=()"]
    return [sys.executable, "-m", "lowrank_jax", name, f"--config={file}", f"--workdir={workdir}", *flags]


def run(arguments: list[str], *, devices: int = 1, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(arguments, env=environment(devices), capture_output=True, text=True, timeout=300, **kwargs)


def start(arguments: list[str], *, devices: int = 1) -> subprocess.Popen[str]:
    """Starts a command; its output is one stream."""
    return subprocess.Popen(
        arguments, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


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


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
