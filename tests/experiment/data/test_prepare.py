import gzip
import sys

import pytest

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.data.prepare import main, restore_gzip_header
from tests import running


def test_a_restored_header_holds_name_and_time_and_the_same_data(tmp_path):
    name, data = "train-labels-idx1-ubyte", bytes(range(256)) * 10
    published, repacked, restored = (tmp_path / part / f"{name}.gz" for part in ("published", "repacked", "restored"))
    for path in (published, repacked, restored):
        path.parent.mkdir()
    with published.open("wb") as file, gzip.GzipFile(name, "wb", fileobj=file, mtime=1504176606) as packed:
        packed.write(data)
    with repacked.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=7) as packed:
        packed.write(data)
    restore_gzip_header(repacked, restored)
    expected = bytearray(published.read_bytes())
    expected[8:10] = b"\0\x03"  # the publisher's compression level and operating system
    assert restored.read_bytes() == bytes(expected)
    assert gzip.decompress(restored.read_bytes()) == data
    restore_gzip_header(published, restored)
    assert restored.read_bytes() == published.read_bytes()


def test_what_is_not_gzip_is_refused(tmp_path):
    (tmp_path / "train-x.gz").write_bytes(b"<html>")
    with pytest.raises(SystemExit, match="is not a gzip file"):
        restore_gzip_header(tmp_path / "train-x.gz", tmp_path / "out")


def test_missing_files_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare", "fashion_mnist", f"--manual-dir={tmp_path}"])
    with pytest.raises(SystemExit, match=f"{tmp_path} does not contain train-images-idx3-ubyte.gz"):
        main()


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/x", "file:///etc", "hf://a/b"])
def test_what_is_neither_a_folder_nor_a_bucket_is_refused(place):
    with pytest.raises(DataError, match="is neither a folder nor a bucket such as gs://bucket/folder"):
        datasets.load(running.config().description, "train", place)


def test_a_users_home_is_found_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "data").mkdir(parents=True)
    assert len(datasets.load(running.config().description, "test", "~/data"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and (tmp_path / "home" / "data" / "digits").is_dir()
