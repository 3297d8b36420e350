"""A trained network made low-rank at once, from Python and from the shell: what it leaves, and what it refuses."""

import json
import pathlib
import shlex
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
import lowrank_jax.experiment as lx
from lowrank_jax.experiment.compression import with_defaults
from lowrank_jax.experiment.config import ConfigError
from lowrank_jax.experiment.errors import UserError, WorkdirError
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.planning import execution
from tests import running
from tests.experiment.cli.test_commands import lowrank

CONFIG = running.ROOT / "configs" / "digits_resnet.py"
TINY = running.settings(epochs=None, lowrank__rules=(), steps=12, checkpoint__every="4 steps", log__tensorboard=False)
HALF = {"lowrank.budget.params": 0.5, "lowrank.moment_batches": 2}

pytestmark = pytest.mark.usefixtures("programs_are_shared")


@pytest.fixture(scope="module")
def programs_are_shared():
    with running.shared_programs():
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    config = lx.load_config(CONFIG, {**TINY, "lowrank.method": "none", "optim.lr": 0.3, "steps": 40})
    return lx.train(config, tmp_path_factory.mktemp("dense") / "run").workdir


def _overrides(dense, **changes):
    return {**TINY, **HALF, "init.weights": str(dense), **{key.replace("__", "."): value for key, value in changes.items()}}


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    return lx.compress(CONFIG, tmp_path_factory.mktemp("made") / "run", _overrides(dense))


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.workdir, tmp_path / "run")


def _steps(folder):
    return sorted(int(step.name) for step in pathlib.Path(folder, "checkpoints").glob("[0-9]*"))


def test_it_says_what_is_lost(made, dense):
    compared = lx.evaluate(made.workdir, against=dense)
    for name in ("agreement", "kl", "logits_error"):
        assert abs(getattr(made.fidelity, name) - getattr(compared.fidelity, name)) < 1e-5
    assert made.fidelity.layers.keys() == compared.fidelity.layers.keys() == {k.name for k in made.plan.factored}
    assert abs(made.low["loss"] - compared.metrics["loss"]) < 1e-5
    assert abs(made.dense["loss"] - lx.evaluate(dense).metrics["loss"]) < 1e-5
    assert made.plan.params <= made.plan.dense_params / 2
    assert made.expected_kl == pytest.approx(sum(kernel.divergence or 0 for kernel in made.plan.kernels))
    assert 0.3 < made.expected_kl / made.fidelity.kl < 3  # to second order
    record = json.loads(pathlib.Path(made.workdir, "compression.json").read_text())
    assert {name: record[name] for name in made.record()} == made.record()
    text = str(made)
    assert all(f"{value:.4f}" in text for value in (made.dense["top1"], made.low["top1"], made.fidelity.agreement))
    assert min(made.seconds) > 0 and made.batch == 64
    chip = lr.chips.CHIPS["v5e"]
    chosen = lr.choose_execution(made.plan, chip, batch=made.config.batch_size)
    dense_times = {kernel.name: execution.dense_seconds(kernel, chip, made.config.batch_size) for kernel in chosen.kernels}
    saved = sum(
        dense_times[kernel.name] - execution.seconds(kernel, kernel.execution or "factored", chip, made.config.batch_size)
        for kernel in chosen.factored
    )
    assert made.estimated["v5e"] == pytest.approx(1 - saved / sum(dense_times.values())) and "estimated" in text


def test_it_leaves_step_0_of_a_run(made, dense):
    assert _steps(made.workdir) == [0]
    assert json.loads(pathlib.Path(made.workdir, "result.json").read_text())["step"] == 0
    config = json.loads(pathlib.Path(made.workdir, "config.json").read_text())
    assert config["lowrank"]["method"] == "two_sided" and config["lowrank"]["budget"]["objective"] == "divergence"
    ours, theirs = lx.restore(made.workdir), lx.restore(dense)
    np.testing.assert_array_equal(
        ours.variables["batch_stats"]["norm1"]["mean"], theirs.variables["batch_stats"]["norm1"]["mean"]
    )


def test_training_goes_on_from_it_and_resumes_to_the_same_bits(made, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "killed")
    whole = lx.train(made.config, folder)
    assert "resuming" in capsys.readouterr().out and whole.step == 12 and whole.metrics["loss"] < made.low["loss"]
    assert pathlib.Path(folder, "result-1.json").exists() and whole.result["step"] == 12
    for batches in (2, 4):
        with running.dying_after(batches):
            train(made.config, str(tmp_path / "killed"))
    assert lx.train(made.config, tmp_path / "killed").metrics == whole.metrics
    with pytest.raises(lx.UserError, match=r"was trained on, to step 12; lowrank evaluate says how good it is"):
        lx.compress(made.config, folder)
    assert json.loads(pathlib.Path(folder, "result.json").read_text())["step"] == 12 and _steps(folder)[-1] == 12
    report = lowrank("report", folder, f"--out={tmp_path / 'report'}")
    assert report.status == 0, report.stderr


def test_it_is_reported_beside_the_dense_run(made, dense, tmp_path):
    report = lowrank("report", dense, made.workdir, f"--out={tmp_path / 'report'}")
    assert report.status == 0, report.stderr
    assert f"{made.low['top1']:.3f}"[:4] in report.stdout


def test_a_second_time_it_measures_what_is_there(made, folder, capsys):
    before = {name: pathlib.Path(folder, name).read_bytes() for name in ("metrics.jsonl", "ranks.json", "weights.json")}
    again = lx.compress(made.config, folder)
    assert "weights of" not in capsys.readouterr().out
    assert (again.low, again.dense, again.fidelity.kl) == (made.low, made.dense, made.fidelity.kl)
    assert _steps(folder) == [0] and not pathlib.Path(folder, "result-1.json").exists()
    assert {name: pathlib.Path(folder, name).read_bytes() for name in before} == before


def test_it_compiles_no_training_step(dense, tmp_path, monkeypatch):
    def compiled(self):
        raise AssertionError("a training step is compiled")

    monkeypatch.setattr(Experiment, "lower_train_step", compiled)
    lx.compress(CONFIG, tmp_path / "run", _overrides(dense, lowrank__method="spectral"))


def test_without_its_source_it_says_so(made, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    overrides = _overrides(tmp_path / "dense", lowrank__method="spectral")
    first = lx.compress(CONFIG, tmp_path / "run", overrides)
    shutil.rmtree(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"init.weights: .*dense: there is no such file or folder"):
        lx.compress(CONFIG, tmp_path / "run", overrides)
    assert lx.train(first.config, tmp_path / "run").step == 12


def test_a_restart_begins_anew_where_checkpoints_are_gone(made, folder):
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(WorkdirError, match="step 0 of this run was saved, and its checkpoints are gone"):
        lx.compress(made.config, folder)
    again = lx.compress(made.config, folder, restart=True)
    assert (folder / "ranks-1.json").exists() and _steps(folder) == [0]
    assert again.low == made.low


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init__weights": None}, "init.weights"),
        ({"lowrank__method": "none"}, "lowrank.method: 'none'; that is the dense network"),
        ({"lowrank__dense_warmup": "4 steps"}, "lowrank.dense_warmup: the network is compressed before it trains"),
        ({"lowrank__moment_batches": 0, "lowrank__method": "two_sided"}, "lowrank.moment_batches: 0"),
        ({"lowrank__method": "random"}, "it would forget"),
        ({"lowrank__budget__params": 1e-9}, "the budget is impossible"),
        ({"init__weights": "nowhere"}, "init.weights: nowhere: there is no such file or folder"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_leaves_nothing(dense, tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        lx.compress(CONFIG, tmp_path / "run", _overrides(dense, **changes))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(dense):
    before = sorted(pathlib.Path(dense).rglob("*"))
    with pytest.raises(WorkdirError, match="belongs to another experiment"):
        lx.compress(CONFIG, dense, _overrides(dense))
    assert sorted(pathlib.Path(dense).rglob("*")) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"lowrank__budget__params": None, "lowrank__scale": 0.5},
        {"lowrank__budget__params": None, "lowrank__scale": None, "lowrank__rank": 4},
        {"lowrank__self_guided": "4 steps"},
        {"lowrank__method": "spectral"},
        {"optim__ema_decay": 0.5, "lowrank__method": "spectral"},
        {"dataset__valid_split": "train[:100]", "dataset__train_split": "train[100:]", "lowrank__method": "spectral"},
    ],
    ids=str,
)
def test_other_ways_to_choose_and_to_train(dense, tmp_path, changes):
    made = lx.compress(CONFIG, tmp_path / "run", _overrides(dense, **changes))
    assert made.plan.factored and np.isfinite(made.fidelity.kl)
    if changes.get("lowrank__rank"):
        assert {kernel.rank for kernel in made.plan.factored} == {4}
    run = lx.train(made.config, tmp_path / "run")
    assert run.step == 12 and not run.interrupted


def squares(outputs, batch, train):
    """An objective of one's own: the squared distance to 1 of the true class's output."""
    del train
    return (jnp.take_along_axis(outputs, batch["label"][:, None], -1)[:, 0] - 1) ** 2, {}


@pytest.mark.parametrize("objective", ["sigmoid", "own"])
def test_other_objectives(tmp_path, objective):
    name = {"own": f"{__name__}:squares"}.get(objective, objective)
    own = {"objective.name": name, "eval.best": "-loss", "dataset.mixup": 0.0}
    other = {**TINY, **own, "lowrank.method": "none"}
    dense = lx.train(lx.load_config(CONFIG, other), tmp_path / "dense").workdir
    overrides = {**_overrides(dense), **own}
    if objective == "own":
        with pytest.raises(ConfigError, match="does not know the curvature of your own loss; use another method"):
            lx.compress(CONFIG, tmp_path / "low", overrides)
        overrides["lowrank.method"] = "spectral"
    made = lx.compress(CONFIG, tmp_path / "low", overrides)
    assert np.isnan(made.fidelity.kl) and made.fidelity.logits_error > 0
    assert "agreement" not in str(made) and "outputs error" in str(made)
    assert (made.expected_kl is None) == (objective == "own")


def test_a_low_rank_run_is_compressed_further(made, tmp_path):
    further = lx.compress(CONFIG, tmp_path / "run", _overrides(made.workdir, lowrank__budget__params=0.3))
    assert further.plan.params <= 0.3 * further.plan.dense_params
    assert further.dense["loss"] == pytest.approx(made.low["loss"], abs=1e-5)


def test_what_is_set_unless_told_otherwise(tmp_path):
    def added(overrides, config=CONFIG):
        return dict(with_defaults(str(config), overrides)[len(overrides) :])

    both = {"lowrank.method": "two_sided", "lowrank.moment_batches": 8}
    budget = {"lowrank.budget.macs": 0.5}
    assert added({}) == both
    assert added(budget) == {**both, "lowrank.budget.objective": "divergence"}
    assert added({"lowrank.budget": {"macs": 0.5}}) == {**both, "lowrank.budget.objective": "divergence"}
    assert added([("lowrank.budget.macs", "None")]) == both
    assert added({"lowrank.method": "spectral", **budget}) == {}
    assert added({"lowrank.method": "two_sided", **budget}).keys() == {"lowrank.moment_batches", "lowrank.budget.objective"}
    assert added({"lowrank.moment_batches": 3}) == {"lowrank.method": "two_sided"}
    assert "lowrank.budget.objective" not in added({**budget, "lowrank.budget.objective": "risk"})
    file = tmp_path / "mine.py"
    file.write_text(
        "from lowrank_jax.config import load\n\n\ndef get_config():\n    config = load('digits_resnet')\n"
        "    config.lowrank.method = 'spectral'\n    config.lowrank.moment_batches = 16\n"
        "    config.lowrank.budget.params = 0.5\n    return config\n"
    )
    assert added({}, file) == {"lowrank.method": "two_sided", "lowrank.budget.objective": "divergence"}


def test_python_refuses_what_it_cannot_read(made, tmp_path):
    with pytest.raises(UserError, match="compress takes a path, a name, a ConfigDict or a config, not a int"):
        lx.compress(5, tmp_path / "run")
    with pytest.raises(UserError, match="overrides are values by dotted key"):
        lx.compress(CONFIG, tmp_path / "run", ["seed"])
    with pytest.raises(UserError, match="overrides are for a config that is loaded here"):
        lx.compress(made.config, tmp_path / "run", {"seed": 1})


def _flags(dense, folder, **changes):
    values = _overrides(dense, **changes)
    return [f"--config={CONFIG}", f"--workdir={folder}", *(f"--config.{key}={value}" for key, value in values.items())]


def test_the_shell_does_the_same_and_says_how_to_go_on(made, dense, tmp_path):
    ended = lowrank("compress", *_flags(dense, tmp_path / "run"), f"--json={tmp_path / 'out.json'}")
    assert ended.status == 0, ended.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    timed = ("seconds", "workdir")
    assert {k: v for k, v in written.items() if k not in timed} == {k: v for k, v in made.record().items() if k not in timed}
    *_, last = ended.stdout.splitlines()
    title, _, command = last.partition(": ")
    assert title == "to train it on"
    program, *arguments = shlex.split(command)
    trained = lowrank(*arguments)
    assert program == "lowrank" and trained.status == 0, trained.stderr
    assert "from step 0" in trained.stdout and "step 12" in trained.stdout
    again = lowrank("compress", *_flags(dense, tmp_path / "run"), f"--json={tmp_path / 'other.json'}")
    assert again.status == 2 and "was trained on, to step 12" in again.stderr and not (tmp_path / "other.json").exists()


def test_a_source_that_is_none_is_one_line(tmp_path):
    ended = lowrank("compress", *_flags(tmp_path / "nowhere", tmp_path / "run"))
    assert ended.status == 2 and not (tmp_path / "run").exists()
    assert "init.weights" in ended.stderr and "there is no such file or folder" in ended.stderr


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_and_the_same_command_does_it(made, dense, tmp_path):
    arguments = running.command(tmp_path / "run", "compress")[:4] + _flags(dense, tmp_path / "run")
    with running.start(arguments, devices=8) as process:
        for line in process.stdout or ():
            if line.startswith("weights of"):
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130 and "Traceback" not in rest and "interrupted" in rest
    assert _steps(tmp_path / "run") == []
    ended = running.run(arguments, devices=8)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert record["fidelity"]["kl"] == pytest.approx(made.fidelity.kl, abs=1e-6)
