"""Every shipped config: what it resolves to, which kernels it factors, and that it trains.

UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py      rewrites the golden files.
"""

import json
import math
import os

import pytest

from lowrank_jax import config as configs
from lowrank_jax.train import train
from tests.running import ROOT

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_file(name):
    config = configs.parse(configs.load(str(ROOT / "configs" / f"{name}.py")))
    text = json.dumps(configs.to_dict(config), indent=2) + "\n\n" + str(configs.make_plan(config)) + "\n"
    file = ROOT / "tests" / "golden" / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_training_and_an_evaluation(name, tmp_path):
    loaded = configs.load(str(ROOT / "configs" / f"{name}.py"))
    shape = configs.parse(loaded).description.image_shape
    small = {
        "batch_size": 16,
        "epochs": None,
        "steps": 1,
        "dataset.name": "synthetic",
        "dataset.kwargs": {"image_shape": shape, "train_size": 32, "test_size": 24},
        "optim.warmup": "0 steps",
        "eval.batch_size": 16,
    }
    for key, value in small.items():
        configs.override(loaded, key, str(value))
    run = train(configs.parse(loaded, devices=8), str(tmp_path))
    assert math.isfinite(run.train[1]["train/loss"])
    assert run.evals[1]["examples"] == 24


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_card_names_its_command(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"lowrank train --config=configs/{name}.py" in text and "Hardware:" in text and "Expected" in text
