"""Files that a command writes when its work is done."""

import os
import resource

import pytest

from lowrank_jax.experiment.cli.output import written_at_the_end


@pytest.fixture
def full():
    """No file of this process may grow beyond 4,096 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(tmp_path, full):
    (tmp_path / "before.csv").write_text("of before")
    for name in ("before.csv", "new.csv"):
        with pytest.raises(OSError, match="File too large"), written_at_the_end(str(tmp_path / name)) as output:
            output.write(b"x" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["before.csv"]
    assert (tmp_path / "before.csv").read_text() == "of before"


def test_a_result_takes_the_place_of_what_was_there_and_its_permissions(tmp_path):
    (tmp_path / "file").write_text("of before")
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "link").symlink_to("file")
    with written_at_the_end(str(tmp_path / "link")) as output:
        output.write("after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "after"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_is_written_to(tmp_path):
    with written_at_the_end(os.devnull) as output:
        output.write("anything")
