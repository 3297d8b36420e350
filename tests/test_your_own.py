"""What docs/your_own.md shows has to run."""

import re
import shlex

import numpy as np
import pytest

from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.cli.flags import parser, split_overrides


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "your_own.md").read_text()


def section(page, title):
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.slow
def test_the_python_runs_as_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training, evaluating, restoring, failing = re.findall(r"```python\n(.*?)```", section(page, "From Python"), re.DOTALL)
    names = {}
    exec(training, names)
    assert names["run"].step == names["config"].total_steps and not names["run"].interrupted
    exec(evaluating, names)
    assert names["evaluation"].classes.counts.sum() == 360
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
