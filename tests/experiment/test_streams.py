"""Standard streams in real processes: closed ones, and readers that leave."""

import subprocess
import sys

import pytest

from tests import running

START = "import os, sys\nfrom lowrank_jax.experiment import streams\nstreams.keep_open()\n"


def program(code, **kwargs):
    return subprocess.Popen([sys.executable, "-c", START + code], cwd=running.ROOT, text=True, **kwargs)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path, number):
    code = f"""
with open({str(tmp_path / "file")!r}, "w") as file:
    assert file.fileno() > 2
    print("out", flush=True)
    print("err", file=sys.stderr, flush=True)
    sys.stdin and sys.stdin.read()
    os.write({number or 1}, b"of a library")
"""
    shell = ["sh", "-c", f'exec {number}>&-; exec "$0" "$@"', sys.executable, "-c", START + code]
    with subprocess.Popen(shell, cwd=running.ROOT) as process:
        assert process.wait(60) == 0
    assert (tmp_path / "file").read_text() == ""


def test_work_goes_on_when_its_reader_leaves(tmp_path):
    code = f"""
print("first", flush=True)
sys.stdin.read()
for i in range(10_000):
    print("more", i)
sys.stdout.flush()
open({str(tmp_path / "done")!r}, "w").close()
print("and at the end")
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with program(code, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == "" and process.wait(60) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_what_cannot_be_written_for_another_reason_is_an_error(flags):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, *flags, "-c", START + "print('much', flush=True)"]
        done = subprocess.run(command, cwd=running.ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and "No space left on device" in done.stderr
