"""The wheel in empty environments: python scripts/test_versions.py [--pythons 3.11,3.12] [--only bare,oldest,newest]

Builds a wheel, installs it for every Python of this machine, and does in an empty folder what a new user would:

* bare: the wheel alone.  The library works, `lowrank configs` too, and training says which extra is missing.
* oldest, newest: the wheel with the extra `train` and the oldest versions of its packages that are allowed and that the index
  has, or whatever pip finds.  Training by name and by path, longer, evaluation, a report, and what `lowrank new` writes.

Pythons that this machine lacks are skipped by name.  Everything is in a temporary folder; several gigabytes are downloaded.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
KINDS = ("bare", "oldest", "newest")
_SECONDS = 1800  # for one command; downloads are large

_OLDEST = """
import importlib.metadata, re, subprocess, sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version
for requirement in map(Requirement, importlib.metadata.requires("lowrank_jax")):
    if requirement.marker and not requirement.marker.evaluate({"extra": "train"}):
        continue
    index = [sys.executable, "-m", "pip", "index", "versions", requirement.name]
    said = subprocess.run(index, capture_output=True, text=True, check=True).stdout
    known = re.search("Available versions: (.*)", said)[1].split(", ")
    print(f"{requirement.name}=={min(requirement.specifier.filter(known), key=Version)}")
"""

_LIBRARY = """
import flax.linen as nn, jax, jax.numpy as jnp, lowrank_jax as lr
model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
x = jnp.ones((4, 32))
variables = model.init(jax.random.key(0), x)
plan = lr.plan(model, x, [lr.Rule(".*/kernel", scale=0.25)])
params = lr.factorize(variables["params"], plan, key=jax.random.key(1))
assert lr.apply(model, {"params": params}, x).shape == (4, 10)
"""


class Failed(Exception):
    """A step did not do what it should."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment, and an empty folder to work in."""

    folder: pathlib.Path

    @property
    def home(self) -> pathlib.Path:
        return self.folder / "empty"

    def make(self, python: str) -> None:
        _run([python, "-m", "venv", str(self.folder / "venv")])
        self.home.mkdir()

    def run(self, program: str, *arguments: str, status: int = 0, says: str = "") -> str:
        """What a program of the environment prints; the variables of the caller's own Python are not passed on."""
        return _run([str(self.folder / "venv" / "bin" / program), *arguments], self.home, status, says)

    def install(self, *arguments: str) -> None:
        self.run("python", str(ROOT / "scripts" / "install.py"), *arguments)


def _run(command: list[str], folder: pathlib.Path = ROOT, status: int = 0, says: str = "") -> str:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX")
    variables = {key: value for key, value in os.environ.items() if key not in hidden}
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        ended = subprocess.run(command, cwd=folder, env=variables, timeout=_SECONDS, **streams)
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command)}\n  has not ended after {_SECONDS} s") from None
    if ended.returncode != status or says not in ended.stdout or "Traceback" in ended.stdout:
        wanted = f"status {status}{f' and {says!r}' if says else ''}"
        end = "\n    ".join(ended.stdout.splitlines()[-25:])
        raise Failed(f"{' '.join(command)}\n  status {ended.returncode} instead of {wanted}\n    {end}")
    return ended.stdout


def bare(environment: Environment, wheel: pathlib.Path) -> None:
    """The library half, and what the experiment half says without its packages."""
    environment.install(str(wheel))
    environment.run("python", "-c", _LIBRARY)
    environment.run("lowrank", "configs", says="digits_resnet")
    environment.run("lowrank", "--version", says="jaxlib")
    environment.run("lowrank", "new", "mynet")
    for command in (["train", "--config=digits_resnet", "--workdir=a"], ["evaluate", "--workdir=a"], ["report", "a"]):
        environment.run("lowrank", *command, status=2, says="pip install 'lowrank_jax[train]'")


def oldest(environment: Environment, wheel: pathlib.Path) -> None:
    environment.install(str(wheel), "--no-deps")
    constraints = environment.folder / "oldest.txt"
    constraints.write_text(environment.run("python", "-c", _OLDEST))
    print("   ", ", ".join(constraints.read_text().split()))
    environment.install(f"{wheel}[train]", "-c", str(constraints))
    journey(environment)


def newest(environment: Environment, wheel: pathlib.Path) -> None:
    environment.install(f"{wheel}[train]", "--upgrade")
    journey(environment)


def journey(environment: Environment) -> None:
    """What a new user does."""
    lowrank, short = "lowrank", "--config.epochs=2"
    print("   ", " ".join(environment.run(lowrank, "--version").split()))
    environment.run(lowrank, "configs", "copy", "digits_resnet", ".")
    environment.run(lowrank, "overview", "--config=imagenet_resnet50_lowrank")  # which changes another config
    train = ("train", "--workdir=runs/a")
    environment.run(lowrank, *train, "--config=digits_resnet", short, says="done")
    environment.run(lowrank, *train, "--config=digits_resnet.py", short, says="runs/a has finished")
    environment.run(lowrank, *train, "--config=digits_resnet", "--config.epochs=4", "--extend", says="steps 45 to 90")
    environment.run(lowrank, "evaluate", "--workdir=runs/a", "--step=best", says="test")
    environment.run(lowrank, "report", "runs/a", says="report.html")
    environment.run(lowrank, "new", "mynet")
    environment.run(lowrank, "train", "--config=mynet/config.py", "--workdir=mynet/runs/a", says="done")
    environment.run(lowrank, "evaluate", "--workdir=mynet/runs/a", "--trust-code", says="test")


def find(version: str) -> str | None:
    """A Python of this version that runs: on the path, of pyenv, or this one."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python"))), sys.executable]
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2], sep='.')"
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", code], capture_output=True, text=True).stdout.strip() == version:
            return candidate
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--pythons", default=",".join(PYTHONS), help=f"default: {','.join(PYTHONS)}")
    parser.add_argument("--only", default=",".join(KINDS), help=f"default: {','.join(KINDS)}")
    args = parser.parse_args()
    pythons, kinds = args.pythons.split(","), args.only.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS] + [p for p in pythons if not re.fullmatch(r"3\.\d+", p)]:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(KINDS)}, or no version such as 3.12")
    outcomes: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="lowrank_versions_") as folder:
        there = pathlib.Path(folder)
        outcomes.append(("wheel", _try("wheel", lambda: _make_wheel(there))))
        for wheel in there.glob("*.whl"):
            for version, kind in itertools.product(pythons, kinds):
                name = f"Python {version}, {kind}"
                outcomes.append((name, _try_python(name, kind, version, there / f"{version}-{kind}", wheel)))
    print("\n".join(f"{name:24}{outcome}" for name, outcome in outcomes))
    ends = [outcome for _, outcome in outcomes]
    return int("failed" in ends or "passed" not in ends[1:])  # besides the wheel


def _make_wheel(folder: pathlib.Path) -> None:
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(ROOT)])


def _try_python(name: str, kind: str, version: str, folder: pathlib.Path, wheel: pathlib.Path) -> str:
    python = find(version)
    if python is None:
        return "skipped: not on this machine"
    return _try(name, lambda: _use(kind, python, folder, wheel))


def _use(kind: str, python: str, folder: pathlib.Path, wheel: pathlib.Path) -> None:
    environment = Environment(folder)
    folder.mkdir()
    try:
        environment.make(python)
        {"bare": bare, "oldest": oldest, "newest": newest}[kind](environment, wheel)
    finally:
        shutil.rmtree(folder / "venv", ignore_errors=True)  # gigabytes


def _try(name: str, work: Callable[[], None]) -> str:
    print(f"{name} ...", flush=True)
    began = time.monotonic()
    try:
        work()
    except Failed as error:
        print(f"  {error}", flush=True)
        return "failed"
    print(f"  passed in {time.monotonic() - began:.0f} s", flush=True)
    return "passed"


if __name__ == "__main__":
    sys.exit(main())
