"""Runs from Python: what the command line does, and the same errors as exceptions."""

import ast
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import lowrank_jax.experiment as lx
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.workdir.writer import Writer
from tests import running
from tests.experiment.data.sources import own_data

CONFIG = running.ROOT / "configs" / "digits_resnet.py"
SMALL = running.settings(
    epochs=None,
    lowrank__rules=(),
    lowrank__method="spectral",
    model__kwargs={"widths": (16,), "batch_norm": True},
    dataset__mixup=0.0,
    checkpoint__every="1000 steps",
)


@pytest.fixture(scope="module")
def config():
    return lx.load_config(CONFIG, SMALL)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    return lx.train(config, tmp_path_factory.mktemp("runs") / "a")


def test_a_config_file_that_changes_the_modes_of_jax_is_refused(tmp_path):
    (tmp_path / "config.py").write_text(
        "import jax\nfrom lowrank_jax.config import load\n"
        "def get_config():\n    jax.config.update('jax_numpy_rank_promotion', 'raise')\n    return load('digits_resnet')\n"
    )
    try:
        with pytest.raises(lx.UserError, match="jax_numpy_rank_promotion is raise"):
            lx.load_config(tmp_path / "config.py")
    finally:
        jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (5, ()),
        (b"digits_resnet", ()),
        (None, ()),
        ("digits_resnet", None),
        ("digits_resnet", 5),
        ("digits_resnet", {5: 3}),
        ("digits_resnet", "seed=1"),
        ("digits_resnet", ["seed"]),
    ],
)
def test_what_is_no_config_and_what_are_no_overrides_is_refused(config, overrides):
    with pytest.raises(lx.UserError, match=r"load_config takes a path|overrides are values by dotted key"):
        lx.load_config(config, overrides)


def test_a_config_is_that_of_the_command_line(config):
    pairs = [(key, str(value)) for key, value in SMALL.items()]
    assert config == configs.read(str(CONFIG), pairs, devices=jax.device_count())
    assert lx.load_config("digits_resnet", {"lowrank.scale": 0.1}) == lx.load_config(str(CONFIG), {"lowrank.scale": 0.1})
    assert lx.load_config(configs.default(), {"epochs": 3, "seed": 7}).seed == 7


def test_every_call_looks_at_the_data_of_its_own(tmp_path):
    def pictures(root, sides):
        for kind in ("a", "b"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            for i in range(20):
                Image.fromarray(np.full((*sides, 3), i, np.uint8)).save(root / kind / f"{i}.bmp")

    pictures(tmp_path / "data", (6, 8))
    settings = {**SMALL, "dataset.name": f"folder:{tmp_path}/data", "objective.metrics": ("top1",)}
    settings["dataset.crop_padding"] = 0
    config = lx.load_config(CONFIG, settings)
    assert config.description.image_shape == (6, 8, 3)
    times = {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "data").iterdir()}
    pictures(tmp_path / "data", (8, 6))  # in place, and as many bytes
    for folder, time in times.items():
        os.utime(folder, ns=(time, time))
    assert config.description.image_shape == (6, 8, 3)
    assert lx.load_config(CONFIG, settings).description.image_shape == (8, 6, 3)


def test_every_call_calls_a_function_of_ones_own(tmp_path, monkeypatch):
    calls: list[Any] = []

    def counted():
        calls.append(own_data.arrays(size=40 + len(calls)))
        return calls[-1]

    monkeypatch.setattr(own_data, "counted", counted, raising=False)
    settings = {**SMALL, "dataset.name": f"{own_data.__name__}:counted", "objective.metrics": ("top1",)}
    settings |= {"dataset.crop_padding": 0, "dataset.flip": False}
    config = lx.load_config(CONFIG, settings)
    assert config.description.sizes["train"] == 40 and len(calls) == 1
    assert lx.load_config(CONFIG, settings).description.sizes["train"] == 41
    lx.train(config, tmp_path / "run")
    assert len(calls) == 3
    with pytest.warns(UserWarning, match="the data has changed since training: train has 43 examples, 42 before"):
        lx.evaluate(tmp_path / "run", trust_code=True)
    lx.restore(tmp_path / "run", trust_code=True)
    assert len(calls) == 4


def test_a_run_says_how_it_ended(trained, config):
    folder = pathlib.Path(trained.workdir)
    result = json.loads((folder / "result.json").read_text())
    assert (trained.step, trained.interrupted, trained.best_step) == (40, False, result["best_step"])
    assert trained.metrics == result["eval"] == trained.evals[40] and {**trained.result, "check": result["check"]} == result
    assert sorted(trained.train) == [10, 20, 30, 40] and "train/loss" in trained.train[10]
    assert len(repr(trained)) < 400


def test_it_is_evaluated_as_by_the_command_line(trained, tmp_path):
    evaluation = lx.evaluate(trained.workdir, step="best", split="test[:100]")
    ended(["evaluate", f"--workdir={trained.workdir}", "--step=best", "--split=test[:100]", f"--json={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out").read_text()) == json.loads(evaluation.json())
    assert evaluation.classes.counts.sum() == 100


def test_a_run_that_has_finished_is_not_trained_again(trained, config, capsys):
    again = lx.train(config, trained.workdir)
    assert "nothing is left to do" in capsys.readouterr().out
    assert (again.metrics, again.step, again.best_step) == (trained.metrics, 40, trained.best_step)


def interrupt_at(words, monkeypatch, times=1):
    """As many real SIGINTs when a run first says this."""
    say, heard = Writer.say, []

    def say_and_interrupt(self, text):
        say(self, text)
        if words in text and not heard:
            heard.append(text)
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Writer, "say", say_and_interrupt)


@pytest.mark.parametrize(("words", "steps"), [("[20/40", 20), ("compiling the training step", 0)])
def test_ctrl_c_saves_and_gives_back_control_and_the_same_call_goes_on(trained, config, tmp_path, monkeypatch, words, steps):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    interrupt_at(words, monkeypatch)
    run = lx.train(config, tmp_path)
    assert (run.interrupted, run.step, run.result, run.metrics) == (True, steps, None, {})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    run = lx.train(config, tmp_path)
    assert (run.interrupted, run.step, run.metrics) == (False, 40, trained.metrics)  # exactly


def test_a_second_ctrl_c_does_not_wait(config, tmp_path, monkeypatch):
    interrupt_at("compiling the training step", monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt):
        lx.train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


STALLING = """
import threading
import numpy as np
from lowrank_jax.experiment.data.own import Data

stalled, comes = threading.Event(), threading.Event()

class Photographs:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if stalled.is_set():
            comes.wait()
        return np.full((8 + index % 2, 9, 3), index % 3 * 80, np.uint8), index % 3

SPLITS = Data({"train": Photographs(96), "test": Photographs(24)}, num_classes=3)

def splits():
    return SPLITS
"""


@pytest.fixture(scope="module")
def stalling(tmp_path_factory):
    """The module of data that stalls when it is told to, a config and a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("stalling")
    (folder / "stalling_photographs.py").write_text(STALLING)
    changes = {"dataset.name": "stalling_photographs:splits", "dataset.image_size": 8, "dataset.crop_padding": 0}
    metrics = {"objective.metrics": ("top1",), "checkpoint.every": "1000 steps", "log.tensorboard": False}
    config = lx.load_config(CONFIG, {**SMALL, **changes, **metrics, "code_dir": str(folder)})
    run = lx.train(config, folder / "undisturbed")
    module = sys.modules["stalling_photographs"]
    yield module, config, run
    module.comes.set()  # or Python would wait for the threads that read


@pytest.mark.parametrize(
    ("words", "steps"),
    [("compiling the training step", range(1)), ("[20/40", range(20, 25)), ("[40/40", range(40, 41))],
    ids=["at the beginning", "in training", "in the evaluation"],
)  # fmt: skip
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_data_that_stalls_does_not_keep_a_run_from_being_saved_nor_the_next_one_from_going_on(
    stalling, tmp_path, monkeypatch, unhandled_sigterm, words, steps, number
):
    module, config, undisturbed = stalling
    monkeypatch.setattr("lowrank_jax.experiment.training.stop._PATIENCE", 0.5)
    say = Writer.say

    def say_and_stall(self, text):
        say(self, text)
        if words in text:
            module.stalled.set()
            threading.Timer(1.0, os.kill, [os.getpid(), number]).start()

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "say", say_and_stall)
        run = lx.train(config, tmp_path)
    assert run.interrupted and run.step in steps and (tmp_path / "checkpoints" / str(run.step)).is_dir()
    module.stalled.clear()  # for whoever reads from now on
    run = lx.train(config, tmp_path)
    assert (run.interrupted, run.step, run.metrics) == (False, 40, undisturbed.metrics)


def test_data_that_stalls_before_there_is_a_state_ends_in_a_keyboard_interrupt(stalling, tmp_path, monkeypatch):
    module, config, _ = stalling
    monkeypatch.setattr("lowrank_jax.experiment.training.stop._PATIENCE", 0.5)
    module.stalled.set()
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt, match="no data came for"):
            lx.train(config, tmp_path)
    finally:
        module.stalled.clear()


def ended(arguments):
    """The status of a command, and what it says on stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        commands.main(list(map(str, arguments)))
    return end.value.code, err.getvalue().rstrip("\n").removeprefix("lowrank: ")


def flags(settings):
    return [f"--config.{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": -3, "lowrank.scael": 0.1},
        {"optim.lr": "fast", "mesh.data": 3},
        {"dataset.name": "digit"},
        {"model.name": "no_such_module:Model"},
    ],
)
def test_problems_of_a_config_are_raised_all_at_once_in_the_words_of_the_command_line(wrong, tmp_path):
    settings = {**SMALL, **wrong}
    status, said = ended(["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *flags(settings)])
    with pytest.raises(lx.ConfigError) as raised:
        lx.train(lx.load_config(CONFIG, settings), tmp_path / "run")
    assert status == 2 and isinstance(raised.value, lx.UserError)
    # What depends on the devices is found when it is trained.
    assert set(str(raised.value).splitlines()[1:]) <= set(said.splitlines())
    assert len(raised.value.problems) >= len(set(wrong) - {"mesh.data"})


def test_a_mesh_that_the_devices_do_not_fit_is_refused_when_it_is_trained(config, tmp_path):
    odd = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=3))
    with pytest.raises(lx.ConfigError, match="mesh"):
        lx.train(odd, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_problems_of_a_work_directory_are_raised_in_the_words_of_the_command_line(trained, config, tmp_path):
    other = {**SMALL, "optim.lr": 0.01}
    status, said = ended(["train", f"--config={CONFIG}", f"--workdir={trained.workdir}", *flags(other)])
    with pytest.raises(lx.WorkdirError) as raised:
        lx.train(lx.load_config(CONFIG, other), trained.workdir)
    assert status == 2 and "a new --workdir" in said and str(raised.value) == said.replace("--workdir", "workdir")
    for use, command in ((lx.evaluate, "evaluate"), (lx.restore, "predict")):
        status, said = ended([command, f"--workdir={tmp_path / 'nowhere'}", *([CONFIG] if command == "predict" else [])])
        with pytest.raises(lx.WorkdirError) as raised:
            use(tmp_path / "nowhere")
        assert (status, str(raised.value)) == (2, said)
    status, said = ended(["evaluate", f"--workdir={trained.workdir}", "--split=tset"])
    with pytest.raises(lx.ConfigError) as raised:
        lx.evaluate(trained.workdir, split="tset")
    assert status == 2 and said.startswith("--split: 1 problem") and str(raised.value) == said.removeprefix("--")
    with pytest.raises(lx.ConfigError, match=r"^dataset: 1 problem"):
        lx.evaluate(trained.workdir, dataset="diggits")
    with pytest.raises(lx.ConfigError, match="as in lowrank evaluate --dataset=imagenet_v2"):
        lx.load_config(CONFIG, {"dataset.name": "imagenet_v2"})


def test_what_the_system_refuses_is_raised_in_the_words_of_the_command_line(trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").mkdir()
    status, said = ended(["evaluate", f"--workdir={tmp_path / 'run'}"])
    with pytest.raises(lx.UserError) as raised:
        lx.evaluate(tmp_path / "run")
    assert (status, str(raised.value)) == (2, said) and said == f"{tmp_path / 'run' / 'config.json'}: it is not a plain file"


def test_a_run_is_made_longer_as_by_the_command_line(config, tmp_path):
    lx.train(config, tmp_path)
    longer = lx.load_config(CONFIG, {**SMALL, "steps": 60})
    with pytest.raises(lx.WorkdirError, match="To go on from its end, add extend=True; else use a new workdir"):
        lx.train(longer, tmp_path)
    with pytest.raises(lx.ConfigError, match="schedule: 1 problem") as raised:
        lx.train(longer, tmp_path, schedule="constant")
    assert raised.value.problems == ["it says how the learning rate of a longer run goes on; add extend=True"]
    with pytest.raises(lx.UserError, match="schedule='cosine' must be restart or constant"):
        lx.train(longer, tmp_path, extend=True, schedule="cosine")
    run = lx.train(longer, tmp_path, extend=True, schedule="constant")
    assert run.step == 60 and lx.restore(tmp_path, 60).step == 60 and lx.restore(tmp_path, 40).step == 40


def test_a_run_that_diverges_raises_what_the_command_line_says(tmp_path):
    settings = {**SMALL, "optim.lr": 1e25}
    status, said = ended(["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'a'}", *flags(settings)])
    with pytest.raises(lx.Diverged) as raised:
        lx.train(lx.load_config(CONFIG, settings), tmp_path / "b")
    assert (status, str(raised.value)) == (4, said)


def test_only_a_config_is_trained(tmp_path):
    with pytest.raises(lx.UserError, match="train takes a config from load_config, not a str"):
        lx.train("digits_resnet", tmp_path)


@pytest.mark.parametrize("wrong", ["", None, 3, b"runs/a"])
def test_a_work_directory_is_named(config, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: lx.train(config, wrong), lambda: lx.evaluate(wrong), lambda: lx.restore(wrong)):
        with pytest.raises(lx.UserError, match=r"^workdir"):
            call()
    with pytest.raises(lx.UserError, match="split is empty"):
        lx.evaluate("run", split="")
    assert not list(tmp_path.iterdir())


def test_names_are_loaded_when_they_are_used_and_known_to_type_checkers(repository):
    code = (
        "import sys, lowrank_jax.experiment as lx; print([n for n in ('jax', 'numpy', 'ml_collections') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    for name in lx.__all__:
        assert getattr(lx, name).__name__ == name
    assert set(lx.__all__) <= set(dir(lx))
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        _ = lx.tarin
    tree = ast.parse((repository / "lowrank_jax" / "experiment" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"lowrank_jax.experiment.{home}" for name, home in lx._HOMES.items()}
    assert sorted(typed) == sorted(lx.__all__)


PROGRAM = """
import sys
import lowrank_jax.experiment as lx
from tests import running

config = lx.load_config({config!r}, {{**running.settings(epochs=None, lowrank__rules=()), "steps": 100_000}})
run = lx.train(config, sys.argv[1])
print("control", run.interrupted, run.step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", ["compiling the training step", "[    20/"])
def test_ctrl_c_in_a_program_of_its_own(tmp_path, words):
    """Where a KeyboardInterrupt would be lost in a callback of the compiler's."""
    program = [sys.executable, "-c", PROGRAM.format(config=str(CONFIG)), str(tmp_path / "run")]
    with running.start(program) as process:  # a thread imports TensorFlow beside it
        seen = ""
        while words not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        process.send_signal(signal.SIGINT)
        seen += process.stdout.read()
    assert process.returncode == 0, seen
    interrupted, step = re.search(r"control (\w+) (\d+)", seen).groups()
    assert interrupted == "True" and (tmp_path / "run" / "checkpoints" / step).is_dir() and "Traceback" not in seen
