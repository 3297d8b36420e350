"""Code by name: what is imported, and from where it never is."""

import sys

import pytest

from lowrank_jax.named_code import import_attribute, is_code, not_in


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, as `python -m` has it: every folder below it is a package."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("runs_of_a_test", "mine_of_a_test")]:
        del sys.modules[name]


def test_a_module_of_the_current_folder_is_found(folder):
    (folder / "mine_of_a_test.py").write_text("value = 5")
    assert import_attribute("mine_of_a_test:value", "model") == 5


@pytest.mark.parametrize("name", ["runs_of_a_test.a.payload:value", "runs_of_a_test.a.package.inner:value"])
def test_nothing_is_imported_out_of_a_work_directory(folder, name):
    run = folder / "runs_of_a_test" / "a"
    (run / "package").mkdir(parents=True)
    for file in ("payload.py", "package/__init__.py", "package/inner.py"):
        (run / file).write_text(f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\nvalue = 5")
    with (
        not_in(str(run)),
        pytest.raises(ValueError, match=r"cannot be imported: .*lies in .*a, the work directory that is read"),
    ):
        import_attribute(name, "model")
    assert not (folder / "ran").exists()
    assert import_attribute(name, "model") == 5  # of the user's own config


@pytest.mark.parametrize("error", ["SystemExit(3)", "GeneratorExit()", "ValueError('no')"])
def test_whatever_a_module_raises_is_a_value_error(folder, error):
    (folder / "mine_of_a_test.py").write_text(f"raise {error}")
    with pytest.raises(ValueError, match="model 'mine_of_a_test:value' cannot be imported"):
        import_attribute("mine_of_a_test:value", "model")


def test_ctrl_c_stays_one(folder):
    (folder / "mine_of_a_test.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        import_attribute("mine_of_a_test:value", "model")


@pytest.mark.parametrize("name", ["a", "a:", ":b", ".a:b", "a..b:c", "a:b.c", "a/b:c", "a:b:c", "os:path.join", "a :b"])
def test_other_forms_are_no_code(name):
    assert not is_code(name)
    with pytest.raises(ValueError, match="cannot be imported: it must look like"):
        import_attribute(name, "model")
