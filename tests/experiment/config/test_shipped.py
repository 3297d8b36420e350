"""Every shipped config: what it resolves to, which kernels it factors, and that it trains.

UPDATE_GOLDEN=1 python -m pytest tests/experiment/config/test_shipped.py      rewrites the golden files.
"""

import json
import math
import os

import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.training.build import build
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.models import efficientnet
from lowrank_jax.models.efficientnet import VARIANTS
from lowrank_jax.paths import named_leaves
from lowrank_jax.text import align
from tests.running import ROOT

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(text):
    return configs.load(str(ROOT / "configs" / text))


# What makes a family's network small and keeps its layers' names, which rules match.
SHRUNK = {
    "resnet8": {"blocks": (1, 1), "widths": (16, 16)},
    "resnet20": {"blocks": (1, 1), "widths": (16, 16)},
    "resnet50": {"blocks": (1, 1), "widths": (16, 16)},
    "efficientnet_b0": {"width": 0.25, "depth": 0.1},
    "vit_s16": {"width": 32, "depth": 1, "heads": 2, "patch": 8},
    "wrn_28_10": {"depth": 10, "widening": 1},
    "mlp": {"widths": (32, 32)},
}
# Of networks, an MLP and a ResNet are left to the fast tier.
FAST = ("digits_resnet", "fashion_mnist_mlp")


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_file(name):
    loaded = load(f"{name}.py")
    config, mesh = configs.read(loaded), {"mesh.data": 2, "mesh.fsdp": 2, "mesh.model": 2}
    shapes = build(configs.read(loaded, mesh, devices=8)).shapes
    shards = [["parameter", "shape", f"sharding at {mesh}".replace("'", "")]]
    shards += [[leaf, str(value.shape), str(value.sharding.spec)] for leaf, value in named_leaves(shapes.params).items()]
    parts = [json.dumps(configs.to_dict(config), indent=2), str(configs.make_plan(config)), align(shards)]
    text = "\n\n".join(parts) + "\n"
    file = ROOT / "tests" / "golden" / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def test_a_step_of_training_and_an_evaluation(name, tmp_path, monkeypatch):
    loaded = load(f"{name}.py")
    # One of each kind of block: without expansion and with a residual, strided, of another window.  The plan of a config
    # is kept: no other test may read these ones.
    monkeypatch.setattr(efficientnet, "STAGES", efficientnet.STAGES[:3])
    config = loaded.to_dict()
    height, width, channels = datasets.describe(config["dataset"]["name"], config["dataset"]["kwargs"]).image_shape
    small = {
        "batch_size": 16,
        "epochs": None,
        "steps": 1,
        "dataset.name": "synthetic",
        "dataset.eval_split": "test",
        "dataset.image_size": None,
        "dataset.crop_area": (0.08, 1.0),
        "dataset.eval_crop": 0.875,
        "dataset.kwargs": {"image_shape": (min(height, 16), min(width, 16), channels), "train_size": 32, "test_size": 24},
        "model.kwargs": {**config["model"]["kwargs"], **SHRUNK.get(config["model"]["name"], {})},
        "optim.warmup": "0 steps",
        "eval.batch_size": 16,
    }
    run = train(configs.read(loaded, small, devices=8), str(tmp_path))
    assert math.isfinite(run.train[1]["train/loss"])
    assert run.evals[1]["examples"] == 24


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_card_names_its_command(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"lowrank train --config={name}" in text
    for line in ("Reproduces: ", "Hardware: ", "Expected time: ", "Expected number: "):
        assert f"\n{line}" in text, line


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_efficientnet_has_images_of_its_size(name):
    size = VARIANTS[name].resolution
    for file in ("imagenet_efficientnet", "imagenet_efficientnet_lowrank"):
        config = load(f"{file}.py:{name.partition('_')[2]}")
        assert (config.model.name, config.dataset.image_size) == (name, size)
        assert round(config.dataset.image_size / config.dataset.eval_crop) == size + 32  # as in the published code


def test_squeeze_and_excitation_is_factored_when_asked_for():
    for argument, expected in (("b0", 0), ("b0,se", 2 * 7)):  # two in the one block of each stage
        loaded = load(f"imagenet_efficientnet_lowrank.py:{argument}")
        plan = configs.make_plan(configs.read(loaded, {"model.kwargs": {**loaded.model.kwargs.to_dict(), "depth": 0.1}}))
        assert sum("/se/" in kernel.name for kernel in plan.factored) == expected
        assert {kernel.note for kernel in plan.kernels if "/depthwise/" in kernel.name} == {"depthwise convolution"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagenet_efficientnet.py:b12", "there is no variant 'b12'; there are b0, b1"),
        ("imagenet_efficientnet_lowrank.py:b12,se", "there is no variant 'b12'; there are b0, b1"),
        ("imagenet_efficientnet_lowrank.py:b0,foo", "after the variant only 'se' may follow, not 'foo'"),
        ("imagenet_resnet50.py:b0", "takes no argument; remove :b0"),
    ],
)
def test_arguments_that_mean_nothing_are_one_problem(text, message):
    with pytest.raises(configs.ConfigError) as caught:
        load(text)
    assert len(caught.value.problems) == 1 and message in caught.value.problems[0]
