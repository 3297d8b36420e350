"""Files that are what they seem: plain ones are read, and nothing is written through a link."""

import errno
import os
import resource
import signal

import pytest

from lowrank_jax.experiment.workdir import files


@pytest.fixture
def outside(tmp_path):
    """A file that is none of the work directory's."""
    (tmp_path / "outside").write_text("precious")
    yield tmp_path / "outside"
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("at", ["a.json", ".a.json.partial"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path, outside, at, dangling):
    (tmp_path / at).symlink_to(tmp_path / "nothing" if dangling else outside)
    files.write(tmp_path / "a.json", b"ours")
    assert (tmp_path / "a.json").read_bytes() == b"ours"
    assert not (tmp_path / "a.json").is_symlink() and not (tmp_path / "nothing").exists()
    assert not (tmp_path / ".a.json.partial").exists()


def test_nothing_is_appended_through_a_link(tmp_path, outside):
    (tmp_path / "lines").symlink_to(outside)
    with pytest.raises(OSError, match="it is a link") as caught:
        files.append(tmp_path / "lines", b"ours")
    assert caught.value.filename == str(tmp_path / "lines")


def test_the_other_name_of_a_file_keeps_what_it_had(tmp_path, outside):
    (tmp_path / "lines").hardlink_to(outside)
    files.append(tmp_path / "lines", b"ours")
    assert files.read_bytes(tmp_path / "lines") == b"preciousours"


@pytest.mark.parametrize("write", [files.write, files.append])
def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path, write):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(tmp_path / "a", bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.filename == str(tmp_path / "a")
    assert not (tmp_path / ".a.partial").exists()


def test_a_file_is_appended_to(tmp_path):
    files.append(tmp_path / "lines", b"1\n")
    files.append(tmp_path / "lines", b"2\n")
    assert files.read_bytes(tmp_path / "lines") == b"1\n2\n"


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "folder", "device"]
)
def test_what_is_no_plain_file_is_not_read(tmp_path, make):
    make(tmp_path / "a")
    with pytest.raises(OSError, match="it is not a plain file"):
        files.read_bytes(tmp_path / "a")
    with pytest.raises(OSError, match=r"plain file|No such device|Is a directory|a link"):  # of the system, or of ours
        files.append(tmp_path / "a", b"1")


def test_a_loop_of_links_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links") as caught:
        files.read_bytes(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP


BAD = ["", "{", "NaN", "[Infinity]", "1e999", "-1e999", "9" * 5000, "[" * 100_000, '{"a":' * 100_000, "\x00"]


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:10])
def test_what_is_no_json_of_finite_numbers_is_a_value_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        files.read_json(tmp_path / "a.json")


def test_bytes_that_are_no_text_are_a_value_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=r"."):
        files.read_json(tmp_path / "a.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**27)  # takes no space
    with pytest.raises(ValueError, match="134,217,728 bytes; at most 67,108,864"):
        files.read_json(tmp_path / "a.json")


def test_a_folder_is_made_with_those_above_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b/c/d", "b/c/d", tmp_path / "e" / "f", "."):
        files.make_folder(folder)
        assert os.path.isdir(folder)  # noqa: PTH112
    (tmp_path / "file").touch()
    for folder in ("file", "file/a/b"):
        with pytest.raises(OSError, match=r"exists|Not a directory"):
            files.make_folder(folder)
    with pytest.raises(OSError, match="name too long"):
        files.make_folder("a/" * 3000)
