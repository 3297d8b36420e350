"""What a user meets who has the package alone: configs, a new project, versions, an extra that is missing."""

import ast
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest

import lowrank_jax
from lowrank_jax.experiment import shipped
from lowrank_jax.experiment.cli import commands, extras
from lowrank_jax.experiment.starting_point import data, model
from tests import running
from tests.running import ROOT


@pytest.fixture
def lowrank(capsys):
    """Runs a command in this process: its status, what it printed, and what it complained about."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            commands.main(list(map(str, arguments)))
        return end.value.code, *capsys.readouterr()

    return run


def test_configs_are_listed_with_a_line_each(lowrank):
    status, out, _ = lowrank("configs")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == shipped.names()
    assert all(shipped.summary(name) in out for name in shipped.names())


def test_a_config_is_copied_and_nothing_is_written_over(lowrank, tmp_path):
    status, out, _ = lowrank("configs", "copy", "digits_resnet", tmp_path)
    copy = tmp_path / "digits_resnet.py"
    assert status == 0 and f"lowrank train --config={copy} " in out
    assert copy.read_text() == (ROOT / "configs" / "digits_resnet.py").read_text()
    copy.write_text("mine")
    status, _, err = lowrank("configs", "copy", "digits_resnet", tmp_path)
    assert (status, copy.read_text()) == (2, "mine") and "is not written over" in err
    copy.unlink()
    copy.symlink_to(tmp_path / "nothing.py")
    assert lowrank("configs", "copy", "digits_resnet", tmp_path)[0] == 2 and not (tmp_path / "nothing.py").exists()


def test_a_copy_goes_into_the_current_folder_by_default(lowrank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lowrank("configs", "copy", "cifar10_wrn")[0] == 0 and (tmp_path / "cifar10_wrn.py").is_file()


@pytest.mark.parametrize(("arguments", "message"), [
    (("digits_resnt", "."), "there is no config 'digits_resnt'; did you mean digits_resnet?"),
    (("../pyproject", "."), "there is no config '../pyproject'"),
    (("digits_resnet", "nowhere"), "nowhere is not a folder"),
])  # fmt: skip
def test_what_cannot_be_copied_is_said_in_one_line(lowrank, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = lowrank("configs", "copy", *arguments)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["configs"], ["new", "x"], ["report", "x"], ["evaluate", "--workdir=x"]])
def test_commands_without_a_config_take_no_settings(lowrank, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    status, _, err = lowrank(*command, "--config.seed=3")
    assert status == 2 and "--config.seed: this command takes no config" in err and not list(tmp_path.iterdir())


def test_the_help_says_where_the_documents_are(lowrank):
    status, out, _ = lowrank("--help")
    assert status == 0 and all(path.is_file() and f"  {path}" in out for path in shipped.documents())
    assert [path.name for path in shipped.documents()] == ["README.md", "your_own.md"]


def test_a_new_project_is_a_folder_of_four_files(lowrank, tmp_path):
    folder = tmp_path / "a net"
    status, out, _ = lowrank("new", folder)
    assert status == 0 and f"lowrank train --config='{folder}/config.py'" in out
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.py", "data.py", "model.py"]
    readme = (folder / "README.md").read_text()
    assert readme.startswith("# a net\n") and len(readme.splitlines()) <= 12 and "NAME" not in readme
    for name in ("config", "data", "model"):
        assert ast.get_docstring(ast.parse((folder / f"{name}.py").read_text()))


def test_the_model_and_the_data_of_a_new_project_fit_each_other():
    splits = data.splits().splits
    assert data.splits().class_names == data.SHAPES
    for (images, labels), count in zip((splits["train"], splits["test"]), (600, 150), strict=True):
        assert images.shape == (count, data.SIDE, data.SIDE, 3) and images.dtype == np.uint8
        assert sorted(set(labels)) == [0, 1, 2] and min(np.bincount(labels)) > count / 5
    again = data.splits().splits["train"]
    assert all(np.array_equal(*pair) for pair in zip(splits["train"], again, strict=True))
    net, some = model.Net(num_classes=len(data.SHAPES)), splits["train"][0][:4] / np.float32(255)
    variables = net.init(jax.random.key(0), some)
    assert net.apply(variables, some).shape == (4, 3)
    logits, updated = net.apply(variables, some, train=True, mutable=["batch_stats"])
    assert logits.shape == (4, 3) and updated["batch_stats"].keys() == variables["batch_stats"].keys()


@pytest.mark.slow
def test_a_new_project_trains_as_it_is(tmp_path):
    folder = tmp_path / "mynet"
    command = [sys.executable, "-m", "lowrank_jax"]
    running.run([*command, "new", "mynet"], cwd=tmp_path)
    trained = running.run([*command, "train", "--config=mynet/config.py", "--workdir=mynet/runs/a"], cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    again = running.run([*command, "train", "--config=config.py", "--workdir=runs/a"], cwd=folder)
    assert "runs/a has finished" in again.stdout
    result = json.loads((folder / "runs" / "a" / "result.json").read_text())
    assert result["eval"]["top1"] > 0.9  # a third by chance
    evaluated = running.run([*command, "evaluate", "--workdir=runs/a", "--step=best", "--trust-code"], cwd=folder)
    assert evaluated.returncode == 0 and "test   150" in evaluated.stdout


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_a_new_project_writes_over_nothing(lowrank, tmp_path, there):
    place = tmp_path / "mynet"
    {"folder": place.mkdir, "file": place.touch, "link": lambda: place.symlink_to(tmp_path / "nowhere")}[there]()
    status, _, err = lowrank("new", place)
    assert status == 2 and "is there already" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "nowhere").exists() and (there != "folder" or not list(place.iterdir()))


def test_a_folder_that_cannot_be_made_is_one_line(lowrank, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = lowrank("new", tmp_path / "file" / "mynet")
    assert status == 2 and "Not a directory" in err and len(err.splitlines()) == 1


def test_the_version_names_packages_and_devices(lowrank):
    status, out, _ = lowrank("--version")
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    assert status == 0 and shown == {
        "lowrank_jax": lowrank_jax.__version__, "python": platform.python_version(), **versions,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }  # fmt: skip


def test_devices_that_cannot_be_used_are_said_to(lowrank, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    status, out, _ = lowrank("--version")
    assert status == 0 and out.endswith("devices      none can be used: Unable to initialize backend 'tpu'\n")


@pytest.mark.parametrize(("package", "extra"), [("absl", "train"), ("ml_collections", "train")])
def test_an_extra_that_is_missing_is_told_in_one_line(package, extra):
    """In a process of its own, whose imports find all but one package."""
    code = f"""
import sys
sys.modules[{package!r}] = None
from lowrank_jax.experiment.cli import commands
commands.main(["train", "--config=digits_resnet", "--workdir=nowhere"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = rf"lowrank: {package}\S* is not installed, which this command needs: pip install 'lowrank_jax\[{extra}\]'\n"
    assert ended.returncode == 2 and re.fullmatch(told, ended.stderr), ended.stderr


@pytest.mark.parametrize("command", [["configs"], ["configs", "copy", "digits_resnet"], ["new", "mynet"]])
def test_light_commands_import_nothing_that_an_extra_brings(command, tmp_path):
    code = f"""
import contextlib, sys
from lowrank_jax.experiment.cli import commands
with contextlib.suppress(SystemExit):
    commands.main({command!r})
found = {{name.split(".")[0] for name in sys.modules}} & {{"jax", "numpy", *{list(extras.EXTRAS)!r}}}
assert not found, found
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 0 and not ended.stderr, ended.stderr


@pytest.mark.parametrize(("error", "message"), [
    (ModuleNotFoundError("no", name="ray"), "ray is not installed, which .*: pip install 'lowrank_jax[train,ray]'"),
    (ModuleNotFoundError("no", name="google.cloud.storage"), "google.cloud.storage is not .* 'lowrank_jax[gcs]'"),
    (ModuleNotFoundError("no", name="libtpu"), "libtpu is not .* 'lowrank_jax[tpu-preflight]'"),
    (ImportError("no libGL.so.1", name="cv2"), "cv2 cannot be imported (no libGL.so.1), .* 'lowrank_jax[train]'"),
    (ImportError("no libfoo.so"), "no libfoo.so; what lowrank itself imports comes with pip install 'lowrank_jax[train]'"),
    (ModuleNotFoundError("no raymond", name="raymond"), "no raymond; what lowrank itself imports comes with .*"),
])  # fmt: skip
def test_what_cannot_be_imported_and_what_brings_it(error, message):
    assert re.fullmatch(re.sub(r"[\[\]()]", r"\\\g<0>", message), extras.missing(error))


def test_a_module_of_ours_that_cannot_be_imported_is_an_accident():
    assert extras.missing(ModuleNotFoundError("No module", name="lowrank_jax.experiment.nowhere")) is None


def test_whatever_the_experiment_half_imports_is_in_an_extra():
    imported = set()
    for file in (ROOT / "lowrank_jax" / "experiment").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    own = {*sys.stdlib_module_names, "lowrank_jax", "jax", "jaxlib", "flax", "optax", "numpy"}
    foreign = {name for name in imported if name.split(".")[0] not in own}
    unknown = {name for name in foreign if not any(f"{name}.".startswith(f"{known}.") for known in extras.EXTRAS)}
    assert not unknown


def test_extras_bring_what_they_are_said_to():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shared = ("etils", "google.cloud", "google.protobuf")  # what several of the packages need, and a folder of many
    providers = importlib.metadata.packages_distributions()
    for package, extra in extras.EXTRAS.items():
        listed = {re.match(r"[\w.-]+", line)[0] for name in extra.split(",") for line in declared[name]}
        names = {name.lower().replace("_", "-") for name in listed}
        bring = {name.lower().replace("_", "-") for name in providers.get(package.split(".")[0], [])}
        assert bring & names or package in shared or (extra == "hf" and package in names), package  # which may be missing here
