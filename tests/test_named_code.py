"""Code by name: what is imported, and from where it never is."""

import pathlib
import sys
import threading
import types

import pytest

from lowrank_jax import named_code
from lowrank_jax.named_code import folder_of, import_attribute, is_code, not_in


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


@pytest.mark.parametrize(
    "name", ["a", "a:", ":b", ".a:b", "a..b:c", "a:b.c", "a/b:c", "a:b:c", ".py:c", "a.py:", "a.py:b.c", "os:path.join", "a :b"]
)
def test_other_forms_are_no_code(name):
    assert not is_code(name)
    with pytest.raises(ValueError, match="cannot be imported: it must look like"):
        import_attribute(name, "model")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of a user's, each with a module `beside_a_test` that imports another one."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(named_code, "_folders", [])
    monkeypatch.setattr(named_code, "_stamps", {})
    before = set(sys.modules)
    for value, name in enumerate(("one", "two")):
        (tmp_path / name / "inside_a_test").mkdir(parents=True)
        (tmp_path / name / "inside_a_test" / "deep.py").write_text(f"value = {value + 10}")
        (tmp_path / name / "beside_a_test.py").write_text("from other_of_a_test import value")
        (tmp_path / name / "other_of_a_test.py").write_text(f"value = {value}")
    yield tmp_path
    for name in set(sys.modules) - before:
        if "_of_a_test" in name or "_a_test" in name:
            del sys.modules[name]


def test_modules_of_a_folder_are_found_with_what_they_import(folders):
    one = str(folders / "one")
    assert import_attribute("beside_a_test:value", "model", one) == 0
    assert import_attribute("inside_a_test.deep:value", "model", one) == 10
    with pytest.raises(ValueError, match=rf"No module named 'nothing_of_a_test', neither among .* nor in {one}"):
        import_attribute("nothing_of_a_test:value", "model", one)
    with pytest.raises(ValueError, match="No module named 'nothing_of_a_test', and no code_dir is set"):
        import_attribute("nothing_of_a_test:value", "model")


def test_files_are_found_from_the_folder_or_by_their_whole_path(folders):
    assert import_attribute("one/beside_a_test.py:value", "model", str(folders)) == 0
    assert import_attribute(f"{folders}/one/beside_a_test.py:value", "model") == 0
    with pytest.raises(ValueError, match=r"there is no file .*one/missing\.py"):
        import_attribute("one/missing.py:value", "model", str(folders))


def test_a_module_of_the_same_name_in_another_folder_is_refused_rather_than_confused(folders):
    assert import_attribute("other_of_a_test:value", "model", str(folders / "one")) == 0
    for name in ("other_of_a_test:value", "beside_a_test.py:value"):  # the second one would import the first one's
        with pytest.raises(ValueError, match=r"cannot be told from the 'other_of_a_test' that was imported from .*one; rename"):
            import_attribute(name, "model", str(folders / "two"))
    assert import_attribute("other_of_a_test:value", "model", str(folders / "one")) == 0


def test_the_current_folder_stays(folders):
    (folders / "one" / "moving_of_a_test.py").write_text("import os; os.chdir('/'); value = 3")
    before = pathlib.Path.cwd()
    assert import_attribute("moving_of_a_test:value", "model", str(folders / "one")) == 3 and pathlib.Path.cwd() == before


@pytest.mark.parametrize("name", ["beside_a_test:value", "beside_a_test.py:value"])
def test_code_that_has_changed_is_imported_anew_where_something_begins(folders, name):
    one = folders / "one"
    assert import_attribute(name, "model", str(one)) == 0
    before = {key for key in sys.modules if "_of_a_test" in key or "beside_a_test" in key}
    named_code.forget_changed()
    assert before <= sys.modules.keys()  # nothing has changed
    (one / "other_of_a_test.py").write_text("value = 1000")
    assert import_attribute(name, "model", str(one)) == 0  # within a run code stays what it was
    named_code.forget_changed()
    assert import_attribute(name, "model", str(one)) == 1000
    (one / "beside_a_test.py").unlink()
    named_code.forget_changed()
    with pytest.raises(ValueError, match="cannot be imported"):
        import_attribute(name, "model", str(one))
    assert "json" in sys.modules and "lowrank_jax.text" in sys.modules


def test_a_file_in_a_work_directory_is_not_imported(folders):
    for name, folder in (("beside_a_test.py:value", folders / "one"), ("other_of_a_test:value", folders / "one")):
        with not_in(str(folders)), pytest.raises(ValueError, match=r"lies in .*, the work directory that is read"):
            import_attribute(name, "model", str(folder))
    assert "other_of_a_test" not in sys.modules


def test_a_folder_is_needed_only_by_what_is_found_nowhere_else(folders):
    one, two = folders / "one", folders / "two"
    (two / "only_of_a_test.py").write_text("")
    assert folder_of(["json:loads", "lowrank_jax.models:MLP", f"{one}/beside_a_test.py:value", "top1"], [one, two]) is None
    assert folder_of(["beside_a_test:value", "json:loads"], [one, two]) == str(one)
    assert folder_of(["beside_a_test:value", "only_of_a_test.py:value"], [one, two]) == str(two)
    assert folder_of(["nothing_of_a_test:value"], [one, two]) == str(one)  # for the message
    import_attribute("beside_a_test:value", "model", str(one))
    assert folder_of(["beside_a_test:value"], [two]) == str(two)  # what one folder has is not known to the next


def test_what_other_threads_import_meanwhile_is_no_problem(folders):
    stop = threading.Event()

    def importing():
        while not stop.is_set():
            for i in range(100):
                sys.modules[f"of_a_test_{i}"] = types.ModuleType("x")
            for i in range(100):
                del sys.modules[f"of_a_test_{i}"]

    thread = threading.Thread(target=importing)
    thread.start()
    try:
        for i in range(20):
            (folders / "one" / f"one_of_a_test_{i}.py").write_text("value = 1")
            assert import_attribute(f"one_of_a_test_{i}.py:value", "model", str(folders / "one")) == 1
    finally:
        stop.set()
        thread.join()
