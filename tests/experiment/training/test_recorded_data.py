"""Runs on a folder of one's own: what they were trained on is kept, and has to be there again."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import lowrank_jax.experiment as lx
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.data.sources import folder as folder_source
from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.training import recorded_data
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.workdir.dataset_record import to_record
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running

KINDS = ("dark", "light", "striped")


def write(root, split, count, seed=0):
    draw = np.random.default_rng(seed)
    for i in range(count):
        kind = KINDS[i % 3]
        values = draw.integers(0, 100, (8, 8, 3)) + (100 if kind == "light" else 0)
        values[::2] += 120 if kind == "striped" else 0
        folder = root / split / kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{i}.png")


def config(root, **changes):
    values = {"dataset__name": f"folder:{root.name}", "dataset__data_dir": str(root.parent), "objective__metrics": ("top1",)}
    return running.config(**values, **changes)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "pictures"
    write(root, "train", 96)
    write(root, "test", 24, seed=1)
    (root / "train" / "README.txt").touch()
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with running.shared_programs():
        return workdir, train(config(pictures), str(workdir))


def test_what_a_run_was_trained_on_is_kept(pictures, trained, capsys):
    workdir, _ = trained
    record = json.loads((workdir / "dataset.json").read_text())
    files = sorted((pictures / "train").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / 255
    np.testing.assert_allclose(record["mean"], pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(record["std"], pixels.std((0, 1, 2)), rtol=1e-9)
    assert record["class_names"] == [*KINDS] and record["sizes"] == {"train": 96, "test": 24}
    assert record["skipped"] == {"not in a class folder": 1} or record["skipped"] == {"not images": 1}
    assert record["digest"] == config(pictures).description.digest


def test_a_run_that_was_stopped_ends_where_an_undisturbed_one_does(pictures, trained, tmp_path):
    stop = running.Stop()
    with running.shared_programs():
        half = train(
            config(pictures, eval__every="15 steps"),
            str(tmp_path / "run"),
            stop=stop,
            on_evaluation=lambda *_: setattr(stop, "requested", True),
        )
        assert half.interrupted
        whole = train(config(pictures, eval__every="15 steps"), str(tmp_path / "run"))
        other = train(config(pictures, eval__every="15 steps"), str(tmp_path / "other"))
    for one, two in zip(*(jax.tree.leaves(result.state.params) for result in (whole, other)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_it_is_evaluated_with_the_mean_that_it_was_trained_with(trained):
    workdir, result = trained
    evaluation = Evaluator().evaluate(str(workdir))
    assert evaluation.metrics["examples"] == 24
    assert evaluation.metrics["loss"] == pytest.approx(result.evals[40]["loss"], rel=1e-5)


def test_it_is_evaluated_on_another_folder_of_the_same_classes(trained, tmp_path):
    workdir, _ = trained
    write(tmp_path / "new", "unseen", 30, seed=3)
    write(tmp_path / "new", "test", 6, seed=4)
    evaluator = Evaluator(dataset=f"folder:{tmp_path}/new", split="unseen")
    assert evaluator.evaluate(str(workdir)).metrics["examples"] == 30
    shutil.rmtree(tmp_path / "new" / "unseen" / "dark")
    shutil.rmtree(tmp_path / "new" / "test" / "dark")
    with pytest.raises(
        configs.ConfigError, match=r"8x8x3 images of 2 classes \(light, striped\); the run was trained on folder:"
    ):
        configs.parse(Workdir(str(workdir)).read_config())  # as another command would, which looks at folders again
        evaluator.evaluate(str(workdir))
    with pytest.raises(configs.ConfigError, match=r"--dataset: 1 problem\n  /nowhere does not exist"):
        Evaluator(dataset="folder:/nowhere").evaluate(str(workdir))


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (np.zeros((6, 8, 8, 3), np.float32), np.arange(6) % 3, "8x8x3 float32 images of 3 classes"),
        (np.zeros((6, 8, 8, 3), np.uint8), np.zeros((6, 2), int), r"labels of shape \[2\] and type int32, 3 classes"),
        (np.zeros((6, 8, 8, 3), np.uint8), np.zeros(6), r"labels of shape \[\] and type float32;"),
    ],
)
def test_other_data_of_another_type_is_refused(trained, tmp_path, images, labels, said):
    names = {"class_names": KINDS} if labels.dtype.kind == "i" else {}
    np.savez(tmp_path / "other.npz", test_image=images, test_label=labels, **names)
    evaluator = Evaluator(dataset=f"arrays:{tmp_path}/other.npz", data_dir="/")
    with pytest.raises(configs.ConfigError, match=rf"--dataset: .*\n.*other\.npz has .*{said}.*the run was trained on folder:"):
        evaluator.evaluate(str(trained[0]))


@pytest.mark.slow
def test_two_processes_measure_and_read_what_one_does(pictures, trained, tmp_path):
    own = {"dataset__name": "folder:pictures", "dataset__data_dir": str(pictures.parent), "objective__metrics": ("top1",)}
    processes = running.start_all(running.command(tmp_path / "two", **own, steps=6), 2)  # two epochs
    first, second = running.wait_all(processes)
    assert [process.returncode for process in processes] == [0, 0], first
    assert second == ""
    one, two = (json.loads((folder / "dataset.json").read_text()) for folder in (trained[0], tmp_path / "two"))
    assert one | {"experiment": "", "check": 0} == two | {"experiment": "", "check": 0}  # what else they are may differ


@pytest.fixture
def moved(pictures, trained, tmp_path):
    """The data and the run elsewhere, to be changed."""
    shutil.copytree(pictures, tmp_path / "data" / "pictures")
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "data" / "pictures", tmp_path / "run"


def test_the_data_may_move(moved, capsys):
    pictures, workdir = moved
    train(config(pictures), str(workdir))
    assert "has finished" in capsys.readouterr().out
    assert Evaluator(data_dir=str(pictures.parent)).evaluate(str(workdir)).metrics["examples"] == 24


def test_other_data_is_refused_with_what_has_changed(moved):
    pictures, workdir = moved
    before = (workdir / "dataset.json").read_bytes()
    write(pictures, "train", 99, seed=2)
    with pytest.raises(
        WorkdirError,
        match=r"pictures is not what this run began with: train has 99 examples, 96 before\. Put it back as it was,",
    ):
        train(config(pictures), str(workdir))
    shutil.rmtree(pictures / "train" / "dark")
    (pictures / "train" / "light").rename(pictures / "train" / "bright")
    with pytest.raises(WorkdirError, match="the class 'bright' is new"):
        train(config(pictures), str(workdir))
    with pytest.raises(WorkdirError, match=r"is not what this run was trained on: .*the class 'bright' is new\. Put it"):
        Evaluator(data_dir=str(pictures.parent)).evaluate(str(workdir))
    assert (workdir / "dataset.json").read_bytes() == before


def test_a_run_whose_data_is_gone_can_still_be_opened(moved):
    pictures, workdir = moved
    shutil.rmtree(pictures)
    folder = Workdir(str(workdir))
    values = folder.read_config()
    values["dataset"] = {**values["dataset"], "data_dir": str(pictures.parent)}
    with recorded_data.used(folder):
        opened = recorded_data.as_trained(configs.parse(values), folder)
        known = opened.description
    assert known.class_names == KINDS
    assert known.mean == tuple(json.loads((workdir / "dataset.json").read_text())["mean"])
    with pytest.raises(DataError, match="folder:pictures is known by the record of a run alone"):
        datasets.load(known, "test", None)
    with pytest.raises(configs.ConfigError, match=r"1 problem\n  dataset\.name: .*/pictures does not exist$"):
        configs.parse(values)
    with pytest.raises(DataError, match="pictures does not exist"):
        Evaluator(data_dir=str(pictures.parent)).evaluate(str(workdir))


def add_one_of_another_size(pictures):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(pictures / "test" / "dark" / "stray.png")


def add_a_class(pictures):
    write(pictures, "train", 3, seed=5)
    shutil.copytree(pictures / "train" / "dark", pictures / "train" / "absent")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_one_of_another_size, r"inputs are 224x224x3 uint8, cropped from many sizes, 8x8x3 uint8 before\. Put it back"),
        (add_a_class, r"classes are 4, 3 before; the class 'absent' is new\. Put it back as it was, or choose other data"),
    ],
)
def test_data_that_its_network_was_not_made_for_is_refused(moved, change, said):
    pictures, workdir = moved
    change(pictures)
    with pytest.raises(WorkdirError, match=rf"folder:pictures is not what this run was trained on: {said}"):
        Evaluator(data_dir=str(pictures.parent)).evaluate(str(workdir))


def test_data_that_has_changed_otherwise_is_evaluated_with_a_warning(moved):
    pictures, workdir = moved
    evaluator = Evaluator(data_dir=str(pictures.parent))
    assert evaluator.evaluate(str(workdir)).warnings() == []
    (pictures / "test" / "dark" / "0.png").unlink()
    evaluation = evaluator.evaluate(str(workdir))
    assert evaluation.metrics["examples"] == 23
    assert evaluation.warnings() == ["the data has changed since training: test has 23 examples, 24 before"]


@pytest.mark.parametrize("change", [add_one_of_another_size, add_a_class, shutil.rmtree])
def test_a_network_is_restored_by_the_record_alone(moved, change, monkeypatch):
    pictures, workdir = moved
    settings = json.loads((workdir / "config.json").read_text())
    settings["dataset"]["data_dir"] = str(pictures.parent)
    (workdir / "config.json").write_text(json.dumps(settings))
    image = (pictures / "test" / "light" / "1.png").read_bytes()
    (workdir / "light.png").write_bytes(image)
    change(pictures)
    monkeypatch.setattr(folder_source, "_scan", None)  # nothing is looked through
    restored = lx.restore(workdir)
    assert restored.dataset.image_shape == (8, 8, 3) and restored.class_names == KINDS
    assert restored.predict(workdir / "light.png")[0].names[0] == "light"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"name": 3}'])
def test_a_damaged_record_is_named(moved, content):
    pictures, workdir = moved
    (workdir / "dataset.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"dataset\.json is damaged: "):
        train(config(pictures), str(workdir))


def test_the_record_of_another_run_is_refused(moved, pictures, tmp_path):
    """Its mean is not that of this run's weights; both may be of the same folder."""
    _, workdir = moved
    other = config(pictures, dataset__train_split="train[:48]", steps=6)
    train(other, str(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "dataset.json", workdir)
    for call in (lambda: lx.restore(workdir), lambda: lx.evaluate(workdir), lambda: train(config(pictures), str(workdir))):
        with pytest.raises((WorkdirError, lx.UserError), match=r"dataset\.json is damaged: it is another experiment's"):
            call()


def test_a_run_of_before_gets_its_record(moved):
    pictures, workdir = moved
    record = (workdir / "dataset.json").read_bytes()
    (workdir / "dataset.json").unlink()
    with pytest.raises(
        WorkdirError, match=r"dataset\.json is missing, which has the mean of folder:pictures; resume the run to"
    ):
        Evaluator(data_dir=str(pictures.parent)).evaluate(str(workdir))
    train(config(pictures), str(workdir))
    assert (workdir / "dataset.json").read_bytes() == record


def test_mean_and_deviation_may_be_given(pictures, tmp_path, capsys):
    given = {"dataset__mean": (0.1, 0.2, 0.3), "dataset__std": (1, 2, 3)}
    experiment = config(pictures, **given)
    assert (experiment.description.mean, experiment.description.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    split = datasets.load(experiment.description, "train", None)
    settled = recorded_data.settle(Workdir(str(tmp_path)), config(pictures), experiment.description, split, print)
    assert settled == experiment.description and "measuring" not in capsys.readouterr().out
    half = dataclasses.replace(experiment.description, std=())
    (tmp_path / "dataset.json").unlink()
    settled = recorded_data.settle(Workdir(str(tmp_path)), config(pictures), half, split, print)
    assert settled.mean == (0.1, 0.2, 0.3) and max(settled.std) < 1
    assert "measuring mean and standard deviation of 96 training examples" in capsys.readouterr().out


def test_published_data_may_have_got_names_for_its_classes(tmp_path):
    digits = running.config(dataset__name="digits")
    record = dataclasses.replace(digits.description, class_names=tuple("abcdefghij"))
    (tmp_path / "dataset.json").write_text(json.dumps(to_record(record)))
    assert recorded_data.as_trained(digits, Workdir(str(tmp_path))).description.mean == record.mean
