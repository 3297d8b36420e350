"""`lowrank predict` as a user meets it."""

import contextlib
import csv
import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.data import datasets, progress
from lowrank_jax.experiment.evaluation.trained import restore
from lowrank_jax.experiment.training.loop import train
from tests import running

NO_IMAGE = "not an image, or of another format than BMP, GIF, JPEG, PNG, TIFF, WEBP"


def lowrank(*arguments):
    """The status of a command, and what it says on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        commands.main(list(map(str, arguments)))
    return end.value.code, out.getvalue().splitlines(), err.getvalue().splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run"
    small = {"model__kwargs": {"widths": (16,)}, "lowrank__method": "none", "dataset__mixup": 0.0}
    train(running.config(steps=20, optim__ema_decay=0.9, **small), str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight digits as files."""
    folder = tmp_path_factory.mktemp("digits")
    images = datasets.load(datasets.describe("digits", {}), "test", None).plain(np.arange(8))["image"]
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    return folder


def test_each_image_has_a_line_with_its_five_likeliest_classes(run, folder):
    status, said, complaints = lowrank("predict", f"--workdir={run}", folder / "3.png", folder)
    assert (status, complaints, len(said)) == (0, [], 9)
    expected = restore(str(run)).predict([folder / "3.png", folder])
    for line, prediction in zip(said, expected, strict=True):
        file, *cells = line.split()
        assert file == prediction.file and cells[::2] == list(prediction.names) and len(cells) == 10
        assert list(map(float, cells[1::2])) == pytest.approx(prediction.probabilities, abs=6e-5)
    assert len({line.index("  ") for line in said}) == 1
    assert lowrank("predict", f"--workdir={run}", "--raw", folder)[1] != said[1:]


def test_no_image_nor_other_result_is_overwritten(run, folder, tmp_path):
    shutil.copy(folder / "3.png", tmp_path / "3.png")
    image = (tmp_path / "3.png").read_bytes()
    status, _, complaints = lowrank("predict", f"--workdir={run}", "--csv", tmp_path / "3.png", folder)
    assert status == 2 and "would overwrite an image; name a file such as predictions.csv" in complaints[0]
    assert (tmp_path / "3.png").read_bytes() == image
    same = tmp_path / "out"
    status, said, complaints = lowrank("predict", f"--workdir={run}", f"--csv={same}", f"--json={tmp_path}/./out", folder)
    assert (status, said, len(complaints)) == (2, [], 1) and "named for two results" in complaints[0] and not same.exists()


def test_a_folder_becomes_a_csv_or_json(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    files = [tmp_path / "out.csv", tmp_path / "out.json"]
    status, said, complaints = lowrank("predict", f"--workdir={run}", f"--csv={files[0]}", f"--json={files[1]}", folder)
    assert status == 0 and said == [f"8 images: {path}" for path in files]
    assert complaints[-1] == "predicting: 7 of 8, about 0s left"
    _, *rows = csv.reader(files[0].read_text().splitlines())
    objects = json.loads(files[1].read_text())
    assert [row[0] for row in rows] == [entry["file"] for entry in objects] == [str(folder / f"{i}.png") for i in range(8)]
    for row, entry in zip(rows, objects, strict=True):
        assert row[1:11:2] == [found["class"] for found in entry["classes"]]
        assert list(map(float, row[2:11:2])) == [found["probability"] for found in entry["classes"]]


def test_what_cannot_be_read_is_named_and_counted_and_the_status_says_so(run, folder, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").touch()
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(photo)
    arguments = [f"--workdir={run}", folder / "0.png", tmp_path, tmp_path / "nowhere.png"]
    status, said, complaints = lowrank("predict", *arguments)
    assert status == 2 and [line.split()[0] for line in said] == [str(folder / "0.png"), str(photo)]
    assert complaints == [
        f"{tmp_path / 'bad.jpg'}: {NO_IMAGE}",
        f"{tmp_path / 'nowhere.png'}: No such file or directory",
        f"1 of 4 images was changed before it was predicted: {photo} was resized from 30x20 to 8x8 and turned grey",
        "1 other file in the folders was passed over",
        "2 of 4 images cannot be read",
    ]
    status, said, _ = lowrank("predict", f"--csv={tmp_path / 'out.csv'}", *arguments)
    assert status == 2 and said == [f"2 images: {tmp_path / 'out.csv'}"]
    assert [row[-1] for row in csv.reader((tmp_path / "out.csv").read_text().splitlines())][1:] == [
        "",
        NO_IMAGE,
        "",
        "No such file or directory",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER", "--step=7"], "has no step 7; choose from ["),
        (["."], ".: no image files there ("),
        (["FOLDER", "--csv=nowhere/out.csv"], "lowrank: nowhere/out.csv: No such file or directory"),
    ],
)
def test_what_is_not_there_is_refused(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    status, said, complaints = lowrank("predict", f"--workdir={run}", *arguments)
    assert status == 2 and said == [] and message in complaints[0]


def test_code_that_nobody_trusts_is_not_imported_and_the_command_with_trust_is_shown(run, folder, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["name"] = "no_such_module:Model"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    status, _, complaints = lowrank("predict", f"--workdir={tmp_path / 'run'}", folder)
    assert status == 2 and "model.name 'no_such_module:Model'" in complaints[0]
    assert complaints[-1] == (
        f"To import it: lowrank predict --workdir={tmp_path / 'run'} {folder} --trust-code=no_such_module:Model"
    )
    status, _, complaints = lowrank("predict", f"--workdir={tmp_path / 'run'}", folder, "--trust-code=no_such_module:Model")
    assert status == 2 and "cannot be imported: No module named 'no_such_module'" in "".join(complaints)


@pytest.mark.slow
def test_the_whole_command(run, folder):
    done = running.run([sys.executable, "-m", "lowrank_jax", "predict", f"--workdir={run}", str(folder)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == lowrank("predict", f"--workdir={run}", folder)[1] and done.stderr == ""
