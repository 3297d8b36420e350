"""Whole runs on ImageNet in small: killed, resumed, evaluated on it and on ImageNet-v2; and what is refused."""

import dataclasses
import json
import signal

import flax.linen as nn
import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.data import datasets
from tests import running
from tests.experiment.training.test_loop import wait_for
from tests.imagenet_files import names, prepare_small_v2

SEED = 0  # of which the flawed image comes up in training, but not in its first batches


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
        **changes,
    }


@pytest.fixture(scope="module")
def trained(small_imagenet, tmp_path_factory):
    """Two runs of the same settings: one undisturbed, one killed and resumed; and what the last process said."""
    folder = tmp_path_factory.mktemp("imagenet_runs")
    steps = {"steps": 300, "checkpoint__every": "35 steps", "log__every": "50 steps", "eval__every": "150 steps"}
    whole, broken = (running.command(folder / name, **settings(small_imagenet, **steps)) for name in ("whole", "broken"))
    done = running.run(whole)
    assert done.returncode == 0, done.stderr
    with running.start(broken) as process:
        wait_for(process, "saved@140")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed = running.run(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    return folder, resumed


def test_a_killed_run_resumes_to_the_same_figures(trained, small_imagenet):
    folder, resumed = trained
    whole, broken = (comparable(folder / name) for name in ("whole", "broken"))
    assert whole == broken
    assert whole[-1]["eval/examples"] == small_imagenet.validation - 1 and whole[-1]["eval/undecodable"] == 1
    assert "imagenet2012/validation: ILSVRC2012_val_00000005.JPEG does not decode" in resumed.stderr
    assert "Traceback" not in resumed.stderr


def test_its_checkpoints_are_evaluated_from_the_command_line(trained, small_imagenet, tmp_path):
    folder, _ = trained
    command = [*running.command(folder)[:3], "evaluate", f"--workdir={folder / 'broken'}", f"--json={tmp_path / 'out.json'}"]
    done = running.run(command)
    assert done.returncode == 0, done.stderr
    assert "1 of 24 images did not decode" in done.stdout
    metrics, final = json.loads((tmp_path / "out.json").read_text())["metrics"], running.metrics(folder / "whole")[-1]
    assert metrics == pytest.approx({name: final[f"eval/{name}"] for name in metrics}, rel=1e-5)


def test_they_are_evaluated_on_another_data_set_of_the_same_classes(trained, small_imagenet, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    sound = [name for name in small_imagenet.images if name not in small_imagenet.truncated.values()]
    prepare_small_v2(tmp_path / "data", tmp_path / "download", {i: small_imagenet.images[sound[i]] for i in range(4)})
    described = datasets._TFDS["imagenet_v2"]
    monkeypatch.setitem(datasets._TFDS, "imagenet_v2", dataclasses.replace(described, sizes={"test": 4}))
    arguments = ["evaluate", f"--workdir={folder / 'whole'}", "--dataset=imagenet_v2", f"--data-dir={tmp_path / 'data'}"]
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    output = capsys.readouterr()
    assert ended.value.code == 0, output.err
    assert output.out.splitlines()[-1].split()[:2] == ["imagenet_v2/test", "4"]


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
    with pytest.raises(SystemExit) as ended:
        commands.main(["evaluate", f"--workdir={folder / 'whole'}", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def comparable(workdir):
    """The lines of metrics.jsonl without what depends on when and where a process began."""
    ours = ("train/images_per_second", "train/undecodable")
    return [{k: v for k, v in line.items() if k not in ours} for line in running.metrics(workdir)]


@pytest.mark.parametrize(("evaluated", "name"), [(False, "n01443537_3.JPEG"), (True, "ILSVRC2012_val_00000005.JPEG")])
def test_too_many_undecodable_images_save_the_run_which_goes_on_exactly_with_a_higher_limit(
    small_imagenet, tmp_path, evaluated, name
):
    # Without the flawed image among those of training there is but the one of evaluation, and the other way round.
    stored = names(small_imagenet, "train").index(small_imagenet.truncated["train"])
    part = f"train[{stored + 1}:]" if evaluated else "train"
    steps = {
        "dataset__train_split": part,
        "steps": 24,
        "batch_size": 8,
        "seed": SEED,
        "eval__every": "6 steps" if evaluated else "1000 steps",
        "checkpoint__every": "1000 steps",
        "log__every": "3 steps",
    }
    whole, ended = (running.command(tmp_path / folder, **settings(small_imagenet, **steps)) for folder in ("whole", "ended"))
    assert running.run(whole).returncode == 0
    done = running.run([*ended, "--config.dataset.max_undecodable=0"])
    assert done.returncode == 2, done.stderr
    assert f"dataset.max_undecodable=0 may: {name}. Raise the limit" in done.stderr and "Traceback" not in done.stderr
    assert "the same command continues it" in done.stdout
    (saved,) = (int(path.name) for path in (tmp_path / "ended" / "checkpoints").iterdir() if path.name.isdecimal())
    assert (saved == 6) if evaluated else (0 < saved < 8)
    resumed = running.run(ended)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming {tmp_path / 'ended'} from step {saved}" in resumed.stdout
    assert comparable(tmp_path / "ended") == comparable(tmp_path / "whole")
    counts = [line["train/undecodable"] for line in running.metrics(tmp_path / "ended") if "train/undecodable" in line]
    assert set(counts) == (set() if evaluated else {1})


def test_an_evaluation_may_have_a_limit_of_its_own(trained, capsys):
    folder, _ = trained
    arguments = ["evaluate", f"--workdir={folder / 'whole'}"]
    with pytest.raises(SystemExit) as ended:
        commands.main([*arguments, "--max-undecodable=0"])
    assert ended.value.code == 2
    assert "(lowrank evaluate: --max-undecodable) to go on without them" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        commands.main([*arguments, "--max-undecodable=1"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        commands.main([*arguments, "--max-undecodable=-1"])
    assert ended.value.code == 2 and "must be a whole number" in capsys.readouterr().err


def problems(**changes):
    with pytest.raises(configs.ConfigError) as caught:
        running.config(**changes)
    return caught.value.problems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset__image_size": 16}, "dataset.image_size: 16; digits images are 8x8 and are not resized; remove this setting"),
        ({"dataset__eval_crop": 1.0}, "dataset.eval_crop: 1.0; digits images are 8x8 and are not resized; remove this setting"),
        (
            {"dataset__randaugment_layers": 2},
            "dataset.randaugment_layers: 2; RandAugment needs RGB images; digits is grey-scale",
        ),
        (
            {"dataset__crop_area": (0.5, 0.2)},
            "dataset.crop_area: (0.5, 0.2); must be two fractions in (0, 1]",
        ),
        (
            {"dataset__name": "imagenet_v2"},
            "dataset.name: 'imagenet_v2'; for evaluation only, as in lowrank evaluate --dataset=imagenet_v2",
        ),
        (
            {"dataset__name": "imagenet2012", "dataset__eval_split": "validation"},
            "dataset.crop_padding: 1; imagenet2012 uses dataset.crop_area; remove this setting",
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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("TenLogits", "model: tests.test_imagenet:TenLogits returns 10 logits; synthetic has 7 classes"),
        (
            "FeatureMaps",
            "model: tests.test_imagenet:FeatureMaps returns shape (1, 32, 32, 4) for a batch of one; expected logits [1, 7]",
        ),
    ],
)
def test_a_model_whose_output_is_no_logit_for_each_class_is_refused(model, message):
    found = problems(
        model__name=f"tests.test_imagenet:{model}",
        model__kwargs={},
        dataset__name="synthetic",
        dataset__kwargs={"num_classes": 7},
    )
    assert found == [message]
