"""What becomes of a wheel that is not built, and of a command that does not end."""

import importlib.util
import sys

import pytest

from tests.running import ROOT


@pytest.fixture
def versions(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("versions_script", ROOT / "scripts" / "test_versions.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # for its dataclass
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["test_versions.py", "--pythons=3.1", "--only=bare"])
    return module


def test_a_wheel_that_cannot_be_built_is_a_failure_like_others(versions, monkeypatch, capsys):
    def fails(folder):
        raise versions.Failed("no compiler")

    monkeypatch.setattr(versions, "_make_wheel", fails)
    assert versions.main() == 1
    said = capsys.readouterr().out
    assert "no compiler" in said and "wheel                   failed" in said and "3.1" not in said


def test_a_wheel_alone_proves_nothing(versions, monkeypatch, capsys):
    monkeypatch.setattr(versions, "_make_wheel", lambda folder: (folder / "a.whl").touch())
    assert versions.main() == 1
    assert "Python 3.1, bare        skipped: not on this machine" in capsys.readouterr().out


def test_a_command_that_does_not_end_has_failed(versions, monkeypatch):
    monkeypatch.setattr(versions, "_SECONDS", 0.2)
    with pytest.raises(versions.Failed, match=r"has not ended after 0\.2 s"):
        versions._run([sys.executable, "-c", "import time; time.sleep(60)"])
