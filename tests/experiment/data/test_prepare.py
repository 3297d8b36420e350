import gzip
import sys

import pytest

from lowrank_jax.experiment.data.prepare import main, restore_gzip_header


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
