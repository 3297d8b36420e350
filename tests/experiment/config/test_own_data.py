"""Settings for data of one's own, and those that its inputs and labels do not take."""

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.relations import relation_problems
from tests.experiment.data.sources import own_data

MLP = {"model.name": "mlp", "model.kwargs": {"widths": (8,)}, "steps": 10, "objective.metrics": ("top1",)}


def problems(name, **changes):
    """What is said of the data set and its settings."""
    settings = {**MLP, "dataset.name": name, **{key.replace("__", "."): value for key, value in changes.items()}}
    try:
        configs.read(configs.default(), settings)
    except configs.ConfigError as error:
        return [problem for problem in error.problems if problem.startswith("dataset.")]
    return []


def own(function, **changes):
    return problems(f"{own_data.__name__}:{function}", **changes)


@pytest.fixture
def pictures(tmp_path):
    for kind in ("a", "b"):
        for i in range(20):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / kind / f"{i}.png")
    return f"folder:{tmp_path}"


def test_a_folder_needs_nothing_but_its_name(pictures):
    assert problems(pictures) == []


def test_all_problems_of_a_folder_are_said_at_once(pictures):
    said = problems(pictures, dataset__kwargs={"channels": 2, "exiv": True, "alpha": "red", "test_share": 1.0})
    assert [line.split(";")[0] for line in said] == [
        "dataset.kwargs.exiv: unknown key",
        "dataset.kwargs.channels: 2",
        "dataset.kwargs.alpha: 'red'",
        "dataset.kwargs.test_share: 1.0",
    ]
    assert "did you mean" in said[0] and "must be one of 3, 1" in said[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset__eval_split": "tset"}, "has no split 'tset'; did you mean test"),
        ({"dataset__mean": (0.5,)}, "dataset.mean: 1 numbers; {} has 3 channels"),
        ({"dataset__std": (0.5, 1, 0)}, "dataset.std: (0.5, 1.0, 0.0); must be above 0"),
        ({"dataset__crop_padding": 8}, "dataset.crop_padding: 8; must be less than the side of an image"),
        ({"dataset__crop_area": (0.5, 1)}, "dataset.crop_area: (0.5, 1.0); {} images are 8x8 and are not resized"),
        ({"dataset__image_size": 16, "dataset__crop_padding": 1}, "dataset.crop_padding: 1; {} uses dataset.crop_area"),
        ({"dataset__kwargs": {"test_share": 0.5, "valid_share": 0.5}}, "leave nothing to train on"),
    ],
)
def test_what_does_not_fit_a_folder_is_said(pictures, changes, message):
    [said] = problems(pictures, **changes)
    assert message.format(pictures) in said


def test_the_limit_of_undecodable_images_is_for_all_folders(pictures):
    assert problems(pictures, dataset__max_undecodable=3) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder:/nowhere", "dataset.name: /nowhere does not exist"),
        ("folder:gs://bucket/x", "dataset.name: gs://bucket/x is not on this machine; copy it, or mount it"),
        ("folder:", "dataset.name: 'folder:'; unknown; a folder of images: folder:PATH"),
        ("arrays:/nowhere.npz", "dataset.name: /nowhere.npz does not exist"),
        ("arrays: ", "dataset.name: 'arrays: '; unknown; a file of NumPy arrays: arrays:FILE.npz"),
        ("tfds:mnits", "dataset.name: TFDS has no data set 'mnits'; did you mean mnist"),
        ("foldr:photos", "dataset.name: data set 'foldr:photos' cannot be imported: No module named 'foldr'"),
        ("no.such.module:function", "dataset.name: data set 'no.such.module:function' cannot be imported: No module named"),
    ],
)
def test_data_that_is_not_there_is_a_problem_in_one_line(name, message):
    [said] = problems(name)
    assert said.startswith(message) and "\n" not in said
    assert name != "foldr:photos" or said.endswith("; did you mean folder:photos?")


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("vectors", {"dataset__flip": True}, "dataset.flip: True; {} has vectors, no images; set it to False"),
        ("vectors", {"dataset__crop_padding": 1}, "dataset.crop_padding: 1; {} has vectors, no images"),
        ("vectors", {"dataset__randaugment_layers": 2}, "dataset.randaugment_layers: 2; {} has vectors, no images"),
        ("vectors", {"dataset__random_erasing": 0.5}, "dataset.random_erasing: 0.5; {} has vectors, no images"),
        ("vectors", {"dataset__cutmix": 1.0}, "dataset.cutmix: 1.0; {} has vectors, no images"),
        ("floats", {"dataset__randaugment_layers": 2}, "RandAugment needs uint8 images; {} has float32"),
        ("vectors", {"dataset__image_size": 8}, "dataset.image_size: 8; {} inputs are vectors of 7 and are not resized"),
        ("vectors", {"dataset__mean": (0, 1)}, "dataset.mean: 2 numbers; {} has 7 features"),
        ("arrays", {"dataset__randaugment_layers": 2}, "RandAugment needs RGB images; {} has 2 channels"),
        ("arrays", {"dataset__max_undecodable": 3}, "dataset.max_undecodable: 3; {} images are 6x5 and are not resized"),
        ("arrays", {"dataset__kwargs": {"sise": 3}}, "dataset.kwargs.sise: {} has no such argument; did you mean size?"),
    ],
)
def test_augmentations_that_make_no_sense_are_refused(function, changes, message):
    said = own(function, **changes)
    assert any(message.format(f"{own_data.__name__}:{function}") in line for line in said), said


def parsed(function, **changes):
    """Of a config whose model has not been looked at: the problems of its data alone."""
    base = {**MLP, "dataset.name": "synthetic"}
    config = configs.read(configs.default(), base)
    import dataclasses

    dataset = dataclasses.replace(config.dataset, name=f"{own_data.__name__}:{function}", eval_split="train", **changes)
    config = dataclasses.replace(config, dataset=dataset)
    return [line for line in relation_problems(config, None, set()) if line.startswith("dataset.")]


def test_an_image_does_not_move_without_its_map():
    for changes in ({"flip": True}, {"crop_padding": 1}, {"randaugment_layers": 1}):
        [(key, value)] = changes.items()
        assert parsed("maps", **changes) == [f"dataset.{key}: {value!r}; would move the image, but not its label"]
    assert parsed("maps") == []
    assert parsed("targets", flip=True) == []


def test_settings_that_do_not_fit_a_folder_are_said_with_the_splits_that_it_lacks(pictures):
    settings = {**MLP, "dataset.name": pictures, "dataset.crop_padding": 8, "dataset.mean": (0.5,)}
    settings |= {"dataset.eval_split": "validation", "dataset.valid_split": "valid", "objective.metrics": ("top9",)}
    with pytest.raises(configs.ConfigError) as raised:
        configs.read(configs.default(), {**settings, "lowrank.rules": ({"path": "nothing", "scale": 0.1},)})
    keys = [line.split(":")[0] for line in raised.value.problems]
    assert keys[:1] == ["objective.metrics"]
    assert keys[1:] == ["dataset.crop_padding", "dataset.mean", "dataset.eval_split", "dataset.valid_split"]
    with pytest.raises(configs.ConfigError) as raised:
        configs.read(
            configs.default(),
            {**settings, "objective.metrics": ("top1",), "lowrank.rules": ({"path": "nothing", "scale": 0.1},)},
        )
    assert len(raised.value.problems) == 5 and "nothing" in raised.value.problems[-1]
