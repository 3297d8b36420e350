"""What `make` installs and when, and the line that shows how far it is."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.running import ROOT

PIP = """
import sys, time
print("Collecting numpy>=2.0")
print("  Downloading numpy-2.4.6.whl (16 MB)")
print("Requirement already satisfied: jax in /x (0.10.2)")
print("ERROR: no such luck" if "bad" in sys.argv else "Successfully installed")
sys.exit(3 if "bad" in sys.argv else 0)
"""


@pytest.fixture
def install(tmp_path):
    """Runs the script with a pip that prints a few lines."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(PIP)

    def run(*arguments):
        command = [sys.executable, str(ROOT / "scripts" / "install.py"), *arguments]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)

    return run


def test_a_success_is_two_lines(install):
    ended = install("good")
    first, last = ended.stdout.splitlines()
    assert (ended.returncode, ended.stderr) == (0, "") and first == "installing good"
    assert last.startswith("installed: 2 packages in ")


def test_a_failure_shows_what_pip_said_and_has_its_status(install):
    ended = install("bad")
    assert ended.returncode == 3 and ended.stdout == "installing bad\n"
    assert ended.stderr.splitlines()[-1] == "ERROR: no such luck" and "Collecting numpy" in ended.stderr


@pytest.fixture
def planned(tmp_path):
    """What `make` would install in a folder with some stamps."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()

    def plan(*arguments, stamps=()):
        for stamp in stamps:
            (tmp_path / ".venv" / f"ready-{stamp}").touch()
        environment = {key: value for key, value in os.environ.items() if key not in ("EXTRAS", "MAKEFLAGS", "PYTHON")}
        ended = subprocess.run(
            ["make", "-n", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return [line.split("'.[")[1].split("]")[0] for line in ended.stdout.splitlines() if "install.py" in line]

    return plan


def test_the_quickstart_installs_the_extra_train_alone(planned):
    assert planned("quickstart") == ["train"]
    assert planned("quickstart", "EXTRAS=train,dev,parity") == ["train"]


def test_the_tests_add_the_rest(planned):
    assert planned("test") == ["train", "dev"]
    assert planned("test", stamps=["train"]) == ["dev"]
    assert planned("quickstart", stamps=["train"]) == []
    assert planned("test", stamps=["train", "dev"]) == []
    assert planned("test", "EXTRAS=train,dev,parity", stamps=["train", "dev"]) == ["parity"]


def test_other_dependencies_are_installed_anew(planned, tmp_path):
    assert planned("check", stamps=["train", "dev"]) == []
    later = (tmp_path / ".venv" / "ready-dev").stat().st_mtime + 10
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert planned("check") == ["train", "dev"]
