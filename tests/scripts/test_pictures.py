"""Photographs out of packages: the list, what is fetched, the crops, the files and the intervals."""

import dataclasses
import hashlib
import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import skimage.data as skimage_data
from PIL import Image
from scipy.stats import t as student

from scripts import pictures
from scripts.pictures import __main__ as command
from scripts.pictures.crops import central_crop, fingerprint, likeness, opened, random_crops
from scripts.pictures.listed import SETS, Picture, read_list, split
from scripts.pictures.packages import fetch
from scripts.pictures.stored import Pictures, file_of, save

LISTED = read_list()


def test_the_list_is_in_order_and_repeats_nothing():
    assert sorted(LISTED) == LISTED
    for values in ([picture.sha256 for picture in LISTED], [picture.name for picture in LISTED]):
        assert len(set(values)) == len(LISTED)
    assert {picture.source for picture in LISTED} == {"debian", "python"}
    assert all(len(picture.sha256) == 64 and not picture.path.startswith("/") for picture in LISTED)


def test_the_sets_are_as_the_rule_says_and_share_no_series():
    sets = split(LISTED)
    assert {picture: picture.set for picture in LISTED} == sets
    of_series = {}
    for picture in LISTED:
        of_series.setdefault(picture.series or picture.name, set()).add(sets[picture])
    assert all(len(found) == 1 for found in of_series.values())
    shares = [sum(picture.set == name for picture in LISTED) / len(LISTED) for name in SETS]
    np.testing.assert_allclose(shares, (0.5, 0.25, 0.25), atol=0.03)


def test_other_packages_have_no_say_in_a_package_s_sets():
    some = [picture for picture in LISTED if picture.package == "tuxpaint-data"]
    assert {picture: split(LISTED)[picture] for picture in some} == split(some)
    unnamed = [dataclasses.replace(picture, set="") for picture in some]
    assert list(split(unnamed).values()) == list(split(some).values())


# What is fetched.


def of_skimage(name: str, sha256: str = "", series: str = "") -> Picture:
    content = (Path(skimage_data.__file__).parent / name).read_bytes()
    return Picture(
        "python", "scikit-image", f"skimage/data/{name}", sha256 or hashlib.sha256(content).hexdigest(), series, SETS[0]
    )


def test_pictures_of_installed_packages_are_found_and_others_are_named(tmp_path, capsys):
    good = of_skimage("chelsea.png")
    changed = of_skimage("coffee.png", sha256="0" * 64)
    gone = dataclasses.replace(good, path="skimage/data/dodo.png")
    absent = dataclasses.replace(good, package="no-such", path="no_such_package/a.png")
    found, missing = fetch([good, changed, gone, absent], tmp_path)
    assert list(found) == [good]
    np.testing.assert_array_equal(opened(found[good]), skimage_data.chelsea())
    assert missing == [
        "no-such (1 pictures): not installed: pip install no-such",
        "scikit-image/skimage/data/coffee.png: another picture in this version of the package (its sha256 differs)",
        "scikit-image/skimage/data/dodo.png: not in this version of the package",
    ]
    assert "scikit-image: 1 of 3 pictures" in capsys.readouterr().out


def test_pictures_of_debian_s_packages_are_copied_out_and_nothing_else(tmp_path, monkeypatch):
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    photographs = {"usr/share/a/same.jpg": b"one", "usr/share/b/same.jpg": b"two", "usr/share/c/other.jpg": b"three"}
    archive = a_debian_package(tmp_path, photographs)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    apt = bin_folder / "apt-get"
    apt.write_text(
        f'#!/bin/sh\n[ "$2" = photos ] || {{ echo "E: Unable to locate package $2" >&2; exit 100; }}\ncp {archive} .\n'
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    wanted = [
        Picture("debian", "photos", path, hashlib.sha256(photographs[path]).hexdigest(), "", SETS[0])
        for path in list(photographs)[:2]
    ]
    into = tmp_path / "into"
    into.mkdir()
    found, missing = fetch([*wanted, dataclasses.replace(wanted[0], package="unheard-of")], into, show=lambda _: None)
    assert {picture.path: file.read_bytes() for picture, file in found.items()} == dict(list(photographs.items())[:2])
    assert sorted(file for file in into.rglob("*") if file.is_file()) == sorted(found.values())
    assert len(missing) == 1
    assert missing[0].startswith("unheard-of (1 pictures): E: Unable to locate package unheard-of; `apt-get update`")


def a_debian_package(folder: Path, files: dict[str, bytes]) -> Path:
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = (
        "Package: photos\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: photographs\n"
    )
    (tree / "DEBIAN" / "control").write_text(control)
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, folder / "photos.deb"], check=True, capture_output=True)
    return folder / "photos.deb"


# Crops.


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red value says how far right a pixel is, and whose green value how far down."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "low", "high"),
    [(2400, 1500, 300, 900), (1000, 700, 300, 700), (640, 480, 240, 480), (480, 360, 224, 360), (200, 180, 180, 180)],
)
def test_crops_are_squares_of_the_sides_that_are_said(width, height, low, high):
    images = random_crops(coordinates(width, height), "a", 60).astype(float)
    across, down = (np.ptp(images[..., channel], (1, 2)) / 255 for channel in (0, 1))
    np.testing.assert_allclose(across * width, down * height, atol=12)  # 8 bits, and the last rows are averages
    sides = down * height
    assert sides.min() > low - 12
    assert sides.max() < high + 12
    np.testing.assert_allclose((sides.min(), sides.max()), (low, high), atol=12 + 0.1 * (high - low))
    # They lie everywhere: the first pixel is at the far left in some, and the last one at the far right.
    assert images[..., 0].min() < 30
    assert images[..., 0].max() > 225


def test_crops_depend_on_the_seed_and_the_name_alone():
    image = coordinates(800, 600)
    images = random_crops(image, "a", 6)
    np.testing.assert_array_equal(random_crops(image, "a", 3), images[:3])
    for others in (random_crops(image, "b", 6), random_crops(image, "a", 6, seed=1)):
        assert not np.any(np.all(others == images, (1, 2, 3)))


def test_a_fine_pattern_becomes_grey():
    checks = Image.fromarray((255 * (np.indices((600, 600)).sum(0) % 2)).astype(np.uint8)).convert("RGB")
    images = random_crops(checks, "a", 4, size=32)
    assert np.abs(images[:, 4:-4, 4:-4].astype(float) - 127.5).max() < 8


def test_a_whole_picture_is_its_middle():
    image = central_crop(coordinates(600, 300), size=100)
    assert image.shape == (1, 100, 100, 3)
    np.testing.assert_allclose(image[0, 50, [0, -1], 0], 255 * np.array([0.25, 0.75]), atol=2)
    np.testing.assert_allclose(image[0, [0, -1], 50, 1], (0, 255), atol=3)


def test_a_picture_is_opened_upright_and_in_colour(tmp_path):
    tags = Image.Exif()
    tags[274] = 6  # the camera was held upright: turn it to the right
    Image.new("L", (40, 20)).save(tmp_path / "a.jpg", exif=tags)
    image = opened(tmp_path / "a.jpg")
    assert (image.size, image.mode) == ((20, 40), "RGB")


def test_copies_look_alike_and_other_pictures_do_not():
    photographs = [Image.fromarray(getattr(skimage_data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    prints = [fingerprint(image) for image in photographs]
    for image, own in zip(photographs, prints, strict=True):
        smaller = image.resize((image.width * 3 // 7, image.height * 3 // 7))
        stored = io.BytesIO()
        smaller.point(lambda value: int(0.6 * value)).save(stored, "JPEG", quality=60)
        assert likeness(own, fingerprint(Image.open(stored).convert("RGB"))) > command.ALIKE
        assert [likeness(own, other) > command.ALIKE for other in prints].count(True) == 1


def test_copies_are_named_unless_they_are_of_one_series():
    prints = {
        of_skimage("chelsea.png", series=series, sha256=str(number)): fingerprint(Image.fromarray(skimage_data.chelsea()))
        for number, series in enumerate(("", "", "cat", "cat"))
    }
    assert [(a.sha256, b.sha256) for a, b in command.copies(prints)] == [
        ("0", "1"),
        ("0", "2"),
        ("0", "3"),
        ("1", "2"),
        ("1", "3"),
    ]


# The command and its files.


def test_the_command_makes_what_it_can_and_names_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    command.main([f"--out={tmp_path}", "--crops=3", "--size=32"])
    sets = pictures.load(tmp_path)
    said = capsys.readouterr().out
    assert list(sets) == list(SETS)
    for name, found in sets.items():
        of_set = [number for number, picture in enumerate(LISTED) if picture.set == name and picture.source == "python"]
        np.testing.assert_array_equal(found.picture, np.repeat(of_set, 3))
        assert found.picture.dtype == np.int32
        assert (found.images.shape, found.images.dtype) == ((3 * len(of_set), 32, 32, 3), np.uint8)
        assert list(found.names[of_set]) == [LISTED[number].name for number in of_set]
        for number, photograph in ((n, LISTED[n]) for n in of_set if LISTED[n].path.endswith(("coffee.png", "chelsea.png"))):
            image = Image.fromarray(getattr(skimage_data, Path(photograph.path).stem)())
            np.testing.assert_array_equal(found.images[found.picture == number], random_crops(image, photograph.name, 3, 32))
    assert "darknet (6 pictures): needs apt-get and dpkg-deb" in said
    assert "scikit-image: 10 of 10 pictures" in said


def test_the_command_makes_whole_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    command.main([f"--out={tmp_path}", "--whole", "--size=16"])
    for found in pictures.load(tmp_path).values():
        assert len(np.unique(found.picture)) == len(found.picture) == len(found.images)


def test_bad_arguments_are_refused_at_once(tmp_path, capsys):
    for arguments, said in {
        ("--crops=0", "--size=0", "--seed=-1"): "--crops=0 is below 1; --size=0 is below 1; --seed=-1 is below 0",
        ("--crops=2", "--whole"): "not allowed with argument",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            command.main([f"--out={tmp_path}", *arguments])
        assert said in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--out={tmp_path}/file"])
    assert "file cannot be a folder: " in capsys.readouterr().err


def test_a_set_without_pictures_is_an_error(tmp_path):
    with pytest.raises(command.UserError, match="no picture for held out, evaluation; nothing was written"):
        command.make(tmp_path, {"crops": 1, "size": 8, "seed": 0, "whole": False}, [of_skimage("chelsea.png")])
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    one = Pictures(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int32), np.array(["a"]), {"seed": 0})
    save(tmp_path, SETS[0], one)
    save(tmp_path, SETS[1], dataclasses.replace(one, made={"seed": 1}))
    with pytest.raises(
        ValueError, match=r"evaluation\.npz does not exist; the files were made by different commands: make them"
    ):
        pictures.load(tmp_path)
    file_of(tmp_path, SETS[2]).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"evaluation\.npz is not a file of crops"):
        pictures.load(tmp_path)


# Intervals.


def clustered(clusters: int, each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values with a variance of 4 between clusters and of 1 within, in random order, and their clusters."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(clusters * each)
    values = np.repeat(2 * rng.standard_normal(clusters), each) + rng.standard_normal(clusters * each)
    return values[order], np.repeat(np.arange(clusters), each)[order]


def test_the_interval_of_a_mean_is_the_normal_one():
    values, picture = clustered(200, 8, seed=0)
    means = np.array([values[picture == cluster].mean() for cluster in range(200)])
    half = 1.96 * means.std() / np.sqrt(200)  # the variance of a mean of 200 draws from these means
    interval = pictures.bootstrap(values, picture)
    np.testing.assert_allclose(interval, (values.mean() - half, values.mean() + half), atol=0.06 * half)
    images = pictures.bootstrap(values, np.arange(len(values)))
    assert np.diff(images)[0] < 0.5 * np.diff(interval)[0]  # what it would be if each image were a picture of its own


def test_the_interval_covers_the_truth_as_often_as_it_says():
    intervals = np.array([pictures.bootstrap(*clustered(40, 4, seed), resamples=400, seed=seed) for seed in range(300)])
    covered = np.mean((intervals[:, 0] < 0) & (intervals[:, 1] > 0))
    # Of 40 clusters: the ends of the interval are at 1.96 sqrt(39/40) of Student's t.  Three standard errors of 300 are 0.041.
    expected = 1 - 2 * student.sf(1.96 * np.sqrt(39 / 40), 39)
    np.testing.assert_allclose(covered, expected, atol=0.041)


def test_the_interval_of_any_statistic_of_pictures_of_any_size():
    # Two pictures: of the four draws two are of one of them alone, so the ends are the statistic of each.
    values, picture = np.array([[1.0, 2.0], [3.0, 4.0], [3.0, 4.0], [1.0, 8.0]]), np.array([7, 3, 3, 7])
    interval = pictures.bootstrap(values, picture, lambda some: some[:, 0].sum() / some[:, 1].sum(), resamples=200)
    np.testing.assert_allclose(interval, (2 / 10, 6 / 8))


def test_the_draws_are_those_of_the_seed():
    values, picture = clustered(20, 2, seed=0)
    first = pictures.bootstrap(values, picture, resamples=50)
    assert pictures.bootstrap(values, picture, resamples=50) == first
    assert pictures.bootstrap(values, picture, resamples=50, seed=1) != first


def test_what_is_no_sample_is_refused():
    for values, picture, problems in [
        ([1.0, np.nan], [0, 0], "a value is not finite; an interval over pictures needs two, got 1"),
        ([1.0, 2.0, 3.0], [0, 1], "one entry for each image"),
        (["a", "b"], [0, 1], "are not numbers"),
    ]:
        with pytest.raises(ValueError, match=problems):
            pictures.bootstrap(values, picture)
    with pytest.raises(ValueError, match="resamples=0 is below 1"):
        pictures.bootstrap([1.0, 2.0], [0, 1], resamples=0)
