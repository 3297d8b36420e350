"""What docs/your_own.md shows of models and losses runs as it is written."""

import json
import re

import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.training.loop import train


@pytest.fixture
def files(repository, tmp_path):
    """The files of the page, in a folder."""
    text = (repository / "docs" / "your_own.md").read_text()
    parts = text[text.index("## Your own model") :].split("```python\n")
    names = [re.findall(r"`(\w+\.py)`", before)[-1] for before in parts[:-1]]
    for name, part in zip(names, parts[1:], strict=True):
        (tmp_path / name).write_text(part.split("```")[0])
    assert names == ["discs.py", "net.py", "segmentation.py", "regression.py"]
    return tmp_path


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
    assert evaluation.metrics == pytest.approx(run.evals[steps[-1]], rel=1e-4)


def test_the_segmentation_is_accepted(files):
    config = configs.read(str(files / "segmentation.py"))
    assert config.description.label.shape == (16, 16) and config.num_outputs == 2
    assert configs.make_plan(config).factored
