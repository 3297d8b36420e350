"""What docs/your_own.md shows has to run."""

import json
import re
import shlex

import numpy as np
import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.cli.flags import parser, split_overrides
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.training.loop import train


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "your_own.md").read_text()


def section(page, title):
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.slow
def test_the_python_runs_as_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training, evaluating, compressing, restoring, failing = re.findall(
        r"```python\n(.*?)```", section(page, "From Python"), re.DOTALL
    )
    names = {}
    exec(training, names)
    assert names["run"].step == names["config"].total_steps and not names["run"].interrupted
    exec(evaluating, names)
    assert names["evaluation"].classes.counts.sum() == 360
    exec(compressing, names)
    assert 0 < names["compared"].kl < 5 and names["made"].plan.params < 0.1 * names["made"].plan.dense_params
    exec(restoring, names)
    net = names["net"]
    assert names["logits"].shape == (3, 10)
    np.testing.assert_allclose(net.merged()(names["images"]), names["logits"], rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    exec(failing, names)
    assert capsys.readouterr().out.splitlines()[0] == "digits_resnet: 2 problems"


def test_the_commands_take_their_flags(page):
    found = re.findall(r"^lowrank (.*?)(?:  +#.*)?$", section(page, "From Python"), re.MULTILINE)
    assert len(found) >= 4
    for command in found:
        _, rest = split_overrides(shlex.split(command))
        parser(commands._COMMANDS, lambda: None).parse_args(rest)  # which would end with a status


@pytest.fixture(scope="module")
def files(page, tmp_path_factory):
    """The files of the sections about models and losses, in a folder."""
    folder = tmp_path_factory.mktemp("own")
    parts = (section(page, "Your own model") + section(page, "Your own loss")).split("```python\n")
    names = [re.findall(r"`(\w+\.py)`", before)[-1] for before in parts[:-1]]
    for name, part in zip(names, parts[1:], strict=True):
        (folder / name).write_text(part.split("```")[0])
    assert names == ["discs.py", "net.py", "segmentation.py", "regression.py"]
    return folder


def test_the_segmentation_is_accepted(files):
    config = configs.read(str(files / "segmentation.py"))
    assert config.description.label.shape == (16, 16) and config.num_outputs == 2
    assert configs.make_plan(config).factored


def test_the_regression_is_accepted(files):
    config = configs.read(str(files / "regression.py"))
    assert config.code_dir == str(files) and str(config.best) == "-error" and configs.make_plan(config).factored


@pytest.mark.slow
def test_the_regression_learns(files):
    config = configs.read(str(files / "regression.py"))
    run = train(config, str(files / "run"))
    steps = sorted(run.evals)
    assert run.evals[steps[-1]]["error"] < run.evals[steps[0]]["error"]
    result = json.loads((files / "run" / "result.json").read_text())
    assert result["best_step"] == min(steps, key=lambda step: (run.evals[step]["error"], -step))
    evaluation = Evaluator(trust_code=True).evaluate(str(files / "run"))
    assert evaluation.metrics == pytest.approx(run.evals[steps[-1]], rel=1e-4, nan_ok=True)  # it need not be sure of any
