"""Configs by name: which there are, where they lie, and that nothing of them runs to list them."""

import importlib.util

import pytest

import lowrank_jax
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment import shipped
from lowrank_jax.experiment.workdir.identity import digest_of
from tests.running import ROOT


@pytest.fixture
def elsewhere(monkeypatch):
    """Has the package found at another place, as an installed one is."""
    yield lambda package: (
        shipped.folder.cache_clear(),
        monkeypatch.setattr(lowrank_jax, "__file__", str(package / "__init__.py")),
    )
    shipped.folder.cache_clear()


def test_names_are_those_of_the_files():
    assert [f"{name}.py" for name in shipped.names()] == sorted(file.name for file in (ROOT / "configs").glob("*.py"))
    assert all(shipped.path(name).parent == ROOT / "configs" for name in shipped.names())


@pytest.mark.parametrize("name", shipped.names())
def test_a_summary_is_the_first_line_of_the_docstring(name):
    spec = importlib.util.spec_from_file_location(name, shipped.path(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert shipped.summary(name) == module.__doc__.splitlines()[0] != ""


def test_a_summary_runs_nothing(tmp_path, elsewhere):
    (tmp_path / "configs").mkdir()
    elsewhere(tmp_path)
    (tmp_path / "configs" / "a.py").write_text('"""What it is.\n\nMore."""\n1 / 0\n')
    (tmp_path / "configs" / "b.py").write_text("1 / 0\n")
    assert {name: shipped.summary(name) for name in shipped.names()} == {"a": "What it is.", "b": ""}


def test_an_installed_package_has_them_beside_its_modules(tmp_path, elsewhere):
    site = tmp_path / "site-packages"
    for folder, name in ((site / "lowrank_jax" / "configs", "ours"), (site / "configs", "another_packages")):
        folder.mkdir(parents=True)
        (folder / f"{name}.py").touch()
    elsewhere(site / "lowrank_jax")
    assert shipped.names() == ["ours"]


@pytest.mark.parametrize(("text", "expected"), [
    ("digits_resnet", True), ("digits_resnet.py", False), ("configs/digits_resnet", False), ("./digits_resnet", False),
    ("a b", True), ("", False), (".", False), ("..", False), ("~/x", False),
])  # fmt: skip
def test_a_name_has_neither_a_folder_nor_a_suffix(text, expected):
    assert shipped.is_name(text) == expected


@pytest.mark.parametrize("name", ["digits_resnet", "imagenet_resnet50_lowrank", "imagenet_efficientnet_lowrank:b1,se"])
def test_a_config_by_name_is_the_one_by_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a name does not depend on where one is
    stem, colon, argument = name.partition(":")
    by_path = str(ROOT / "configs" / f"{stem}.py") + colon + argument
    assert configs.load(name).to_dict() == configs.load(by_path).to_dict()
    if name == "digits_resnet":
        assert digest_of(configs.read(name)) == digest_of(configs.read(by_path))


def test_a_copy_of_a_config_that_changes_another_works_anywhere(tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text(shipped.path("imagenet_resnet50_lowrank").read_text())
    assert configs.load(str(copy)).to_dict() == configs.load("imagenet_resnet50_lowrank").to_dict()


@pytest.mark.parametrize(("given", "problem"), [
    ("digits_resnt", "there is no such config; did you mean digits_resnet?"),
    ("mine", "there is no such config; did you mean mine.py?"),
    ("mine:argument", "there is no such config; did you mean mine.py?"),
    ("configs/digits_resnet.py", "there is no such file; did you mean digits_resnet?"),
    ("digits_resnet.py", "there is no such file; did you mean digits_resnet?"),
    ("mien.py", "there is no such file; did you mean mine.py?"),
    ("sub", "it is a folder; name a Python file, or a config that lowrank configs lists"),
    ("text", "it is not a Python file"),
    ("qqqq", "there is no such config; known: cifar10_resnet, "),
    ("qqqq.py", "there is no such file; known: mine.py, cifar10_resnet, "),
])  # fmt: skip
def test_near_misses_are_proposed_among_names_and_files(given, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    (tmp_path / "text").touch()
    (tmp_path / "sub").mkdir()
    with pytest.raises(configs.ConfigError) as caught:
        configs.load(given)
    assert caught.value.problems[0].startswith(problem) and len(caught.value.problems) == 1


def test_a_name_is_the_shipped_config_whatever_lies_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_resnet.py").write_text("1 / 0")
    (tmp_path / "digits_resnet").mkdir()
    assert configs.read("digits_resnet").model.name == "resnet8"
    with pytest.raises(configs.ConfigError, match="ZeroDivisionError"):
        configs.load("digits_resnet.py")
