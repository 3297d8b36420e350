"""Whole runs on ImageNet in small: killed, resumed, evaluated on it and on ImageNet-v2; and what is refused."""

import dataclasses
import json
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.data.sources import tfds_records
from lowrank_jax.experiment.training.loop import train
from tests import running
from tests.experiment.training.test_loop import wait_for
from tests.imagenet_files import names, write_small_v2


def settings(small, **changes):
    return {
        "dataset__name": "imagenet2012",
        "dataset__data_dir": str(small.data_dir),
        "dataset__kwargs": small.kwargs,
        "dataset__eval_split": "validation",
        "dataset__image_size": 32,
        "dataset__crop_padding": 0,
        "dataset__randaugment_layers": 1,
        "eval__batch_size": 16,
        "lowrank__method": "spectral",
        "model__kwargs": {"widths": (16,)},  # the data is what these runs are about
        "optim__lr": 1e-3,
        "dataset__mixup": 0.0,
        **changes,
    }


def seed_of_flaw(small, batch, batch_size=8):
    """A seed for which the training image that is cut short is in this batch of the first epoch."""
    flaw = names(small, "train").index(small.truncated["train"])
    orders = ((seed, np.random.default_rng([seed, 0]).permutation(small.train)) for seed in range(100))
    return next(seed for seed, order in orders if list(order).index(flaw) // batch_size == batch)


STEPS = {
    "steps": 24,
    "batch_size": 8,
    "eval__every": "1000 steps",
    "checkpoint__every": "1000 steps",
    "log__every": "3 steps",
}


@pytest.fixture(scope="module")
def trained(small_imagenet, tmp_path_factory):
    """The folder of an undisturbed run, and its settings."""
    folder = tmp_path_factory.mktemp("imagenet_runs") / "whole"
    given = settings(small_imagenet, **STEPS, seed=seed_of_flaw(small_imagenet, 6))
    train(running.config(**given), str(folder))
    return folder, given


def evaluated(*arguments):
    """The exit status of `lowrank evaluate`."""
    with pytest.raises(SystemExit) as ended:
        commands.main(["evaluate", *arguments])
    return ended.value.code


def test_its_checkpoints_are_evaluated_from_the_command_line(trained, small_imagenet, tmp_path, capsys):
    folder, _ = trained
    assert evaluated(f"--workdir={folder}", f"--json={tmp_path / 'out.json'}") == 0
    assert "1 of 24 images cannot be decoded" in capsys.readouterr().out
    metrics, final = json.loads((tmp_path / "out.json").read_text())["metrics"], running.metrics(folder)[-1]
    assert metrics == pytest.approx({name: final[f"eval/{name}"] for name in metrics}, rel=1e-5)
    assert final["eval/examples"] == small_imagenet.validation - 1 and final["eval/undecodable"] == 1


def test_they_are_evaluated_on_another_data_set_of_the_same_classes(trained, small_imagenet, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    sound = [name for name in small_imagenet.images if name not in small_imagenet.truncated.values()]
    write_small_v2(tmp_path / "data", {i: small_imagenet.images[sound[i]] for i in range(4)})
    smaller = dataclasses.replace(datasets.describe("imagenet_v2", {}), sizes={"test": 4})
    monkeypatch.setitem(datasets.DATASETS, "imagenet_v2", tfds_records.source(smaller))
    assert evaluated(f"--workdir={folder}", "--dataset=imagenet_v2", f"--data-dir={tmp_path / 'data'}") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["imagenet_v2/test", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=digits"], "digits has 8x8x1 images of 10 classes (digits); the run was trained on imagenet2012, 32x32x3"),
        (["--dataset=imagenet_v3"], "--dataset: 1 problem\n  unknown 'imagenet_v3'; did you mean imagenet_v2?"),
        (["--dataset=imagenet_v2", "--split=validation"], "imagenet_v2 has no split 'validation'"),
        (["--split=test"], "imagenet2012 has no split 'test'"),
        (
            ["--data-dir=/nowhere"],
            "imagenet2012 is not prepared under /nowhere; run: scripts/prepare_imagenet.sh MANUAL_DIR /no",
        ),
    ],
)
def test_what_does_not_fit_the_run_is_refused(trained, arguments, message, capsys):
    folder, _ = trained
    assert evaluated(f"--workdir={folder}", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_evaluation_may_have_a_limit_of_its_own(trained, capsys):
    folder, _ = trained
    assert evaluated(f"--workdir={folder}", "--max-undecodable=0") == 2
    assert "(lowrank evaluate: --max-undecodable) to continue without them" in capsys.readouterr().err
    assert evaluated(f"--workdir={folder}", "--max-undecodable=1") == 0
    assert evaluated(f"--workdir={folder}", "--max-undecodable=-1") == 2
    assert "must be a whole number" in capsys.readouterr().err


def comparable(workdir):
    """The lines of metrics.jsonl without what depends on when and where a process began."""
    ours = ("train/images_per_second", "train/undecodable")
    return [{k: v for k, v in line.items() if k not in ours} for line in running.metrics(workdir)]


def ended_and_resumed(folder, given, name):
    """Trains without patience for undecodable images, then with some; returns the step between, and what the counts were."""
    with pytest.raises(DataError, match=rf"more than dataset.max_undecodable=0: {name}\. Raise the limit"):
        train(running.config(**given, dataset__max_undecodable=0), str(folder))
    (saved,) = (int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    train(running.config(**given), str(folder))
    return saved, {line["train/undecodable"] for line in running.metrics(folder) if "train/undecodable" in line}


def test_too_many_undecodable_images_save_the_run_which_goes_on_exactly_with_a_higher_limit(trained, tmp_path, capsys):
    whole, given = trained
    assert ended_and_resumed(tmp_path, given, "n01443537_3.JPEG") == (6, {1})
    assert "the same command continues it" in capsys.readouterr().out
    assert comparable(tmp_path) == comparable(whole)


def test_so_do_those_of_an_evaluation(small_imagenet, tmp_path):
    after_the_flaw = names(small_imagenet, "train").index(small_imagenet.truncated["train"]) + 1
    given = settings(
        small_imagenet,
        **{**STEPS, "steps": 12, "eval__every": "6 steps"},
        dataset__train_split=f"train[{after_the_flaw}:]+train[:{after_the_flaw - 1}]",
    )
    train(running.config(**given), str(tmp_path / "whole"))
    assert ended_and_resumed(tmp_path / "ended", given, "ILSVRC2012_val_00000005.JPEG") == (6, set())
    assert comparable(tmp_path / "ended") == comparable(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_figures(small_imagenet, tmp_path):
    steps = {"steps": 120, "checkpoint__every": "21 steps", "log__every": "30 steps", "eval__every": "60 steps"}
    whole, broken = (running.command(tmp_path / name, **settings(small_imagenet, **steps)) for name in ("whole", "broken"))
    done = running.run(whole)
    assert done.returncode == 0, done.stderr
    with running.start(broken) as process:
        wait_for(process, "[ 60/120")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed = running.run(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    whole, broken = (comparable(tmp_path / name) for name in ("whole", "broken"))
    assert whole == broken
    assert whole[-1]["eval/examples"] == small_imagenet.validation - 1 and whole[-1]["eval/undecodable"] == 1
    assert "imagenet2012/validation: ILSVRC2012_val_00000005.JPEG cannot be decoded" in resumed.stderr
    assert "Traceback" not in resumed.stderr


@pytest.mark.slow
def test_a_run_that_ends_for_its_images_has_status_2_and_can_be_resumed(small_imagenet, tmp_path):
    given = settings(small_imagenet, **STEPS, seed=seed_of_flaw(small_imagenet, 6))
    command = running.command(tmp_path, **given)
    done = running.run([*command, "--config.dataset.max_undecodable=0"])
    assert done.returncode == 2, done.stderr
    assert "more than dataset.max_undecodable=0: n01443537_3.JPEG. Raise the limit" in done.stderr
    assert "Traceback" not in done.stderr and "the same command continues it" in done.stdout
    resumed = running.run(command)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming {tmp_path} from step 6" in resumed.stdout


def problems(**changes):
    with pytest.raises(configs.ConfigError) as caught:
        running.config(**changes)
    return caught.value.problems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset__image_size": 16}, "dataset.image_size: 16; digits images are 8x8 and are not resized; set it to None"),
        ({"dataset__eval_crop": 1.0}, "dataset.eval_crop: 1.0; digits images are 8x8 and are not resized; set it to 0.875"),
        (
            {"dataset__randaugment_layers": 2},
            "dataset.randaugment_layers: 2; RandAugment needs RGB images; digits is grey-scale",
        ),
        (
            {"dataset__crop_area": (0.5, 0.2)},
            "dataset.crop_area: (0.5, 0.2); must be two fractions in (0, 1], the smaller one first",
        ),
        (
            {"dataset__name": "imagenet_v2"},
            "dataset.name: 'imagenet_v2'; for evaluation only, as in lowrank evaluate --dataset=imagenet_v2",
        ),
        (
            {"dataset__name": "imagenet2012", "dataset__eval_split": "validation"},
            "dataset.crop_padding: 1; imagenet2012 uses dataset.crop_area; set it to 0",
        ),
        (
            {"dataset__name": "imagenet2012", "dataset__crop_padding": 0},
            "dataset.eval_split: imagenet2012 has no split 'test'; known: train, validation",
        ),
        (
            {"dataset__name": "imagenet2012", "dataset__kwargs": {"test_size": 3}},
            "dataset.kwargs.test_size: unknown key; did you mean dataset.kwargs.train_size?",
        ),
    ],
)
def test_settings_that_the_images_do_not_have_are_refused(changes, message):
    assert message in problems(**changes)


class TenLogits(nn.Module):
    """A model that does not ask how many classes there are."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(nn.relu(nn.Dense(8)(x.mean((1, 2)))))


class FeatureMaps(TenLogits):
    """A model without a head."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Conv(4, (3, 3))(x)


class Constant(TenLogits):
    """A model without parameters."""

    @nn.compact
    def __call__(self, x, train=False):
        return jnp.zeros((len(x), self.num_classes))


class OneImage(TenLogits):
    """A model that takes no batches."""

    @nn.compact
    def __call__(self, x, train=False):
        if len(x) > 1:
            raise SystemExit("one at a time")
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Noisy(TenLogits):
    """A model with a stream of randomness that training does not have."""

    @nn.compact
    def __call__(self, x, train=False):
        noise = jax.random.normal(self.make_rng("noise"), (self.num_classes,)) if train else 0.0
        return nn.Dense(self.num_classes)(x.mean((1, 2))) + noise


class Switched(TenLogits):
    """A model with a parameter that has no gradient."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes)(x.mean((1, 2))) * self.param("on", lambda key: jnp.ones((), bool))


class Votes(TenLogits):
    """A model of whole numbers."""

    @nn.compact
    def __call__(self, x, train=False):
        return (nn.Dense(self.num_classes)(x.mean((1, 2))) > 0).astype(jnp.int32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("OneImage", "model or lowrank: one at a time"),
        ("Noisy", 'model or lowrank: None needs PRNG for "noise"'),
        ("Switched", "model: the parameter 'on' is bool; only floating-point numbers are trained"),
        ("Votes", f"model: {__name__}:Votes returns int32; logits must be floating-point numbers"),
        ("Constant", f"model: {__name__}:Constant has no parameters"),
        ("TenLogits", f"model: {__name__}:TenLogits returns 10 logits; synthetic has 7 classes"),
        (
            "FeatureMaps",
            f"model: {__name__}:FeatureMaps returns shape (2, 32, 32, 4) for a batch of two; expected logits [2, 7]",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_on_batches_is_refused(model, message):
    [found] = problems(
        model__name=f"{__name__}:{model}",
        model__kwargs={},
        dataset__name="synthetic",
        dataset__kwargs={"num_classes": 7},
    )
    assert found.startswith(message)
