"""The command line as a user meets it: real processes, exit statuses, no tracebacks."""

import json
import re
import signal
import sys

import pytest

from tests import running

CONFIG = f"--config={running.ROOT / 'configs' / 'digits_resnet.py'}"


def lowrank(*arguments, devices=1):
    result = running.run([sys.executable, "-m", "lowrank_jax", *map(str, arguments)], devices=devices)
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    result = running.run(running.command(workdir, steps=200, eval__every="50 steps"))
    assert result.returncode == 0, result.stderr
    return workdir


def test_evaluate_prints_a_table_and_writes_json(trained, tmp_path):
    result = lowrank("evaluate", f"--workdir={trained}", f"--json={tmp_path / 'out.json'}")
    assert result.returncode == 0, result.stderr
    header, row = (line.split() for line in result.stdout.splitlines())
    assert header[:6] == ["split", "examples", "top1", "top5", "loss", "step"] and row[0] == "test" and row[1] == "360"
    written = json.loads((tmp_path / "out.json").read_text())
    final = json.loads((trained / "result.json").read_text())["eval"]
    assert written["step"] == 200
    # Another batch size, so another order of additions.
    assert written["metrics"]["top1"] == final["top1"] and abs(written["metrics"]["loss"] - final["loss"]) < 1e-5


def test_evaluate_on_other_steps_splits_and_devices(trained):
    best = lowrank("evaluate", f"--workdir={trained}", "--step=best", "--split=train[:100]", devices=8)
    assert best.returncode == 0, best.stderr
    assert best.stdout.splitlines()[1].split()[:2] == ["train[:100]", "100"]


def test_evaluate_takes_several_work_directories(trained, tmp_path):
    result = lowrank("evaluate", "--workdir", trained, tmp_path / "nowhere", f"--json={tmp_path / 'out.json'}")
    assert result.returncode == 2 and f"{tmp_path / 'nowhere'} is not a work directory" in result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["workdir", "split"], [str(trained), "test"]]
    (written,) = json.loads((tmp_path / "out.json").read_text())
    assert (written["workdir"], written["step"]) == (str(trained), 200)


def test_a_watch_stopped_by_a_signal_has_its_status(tmp_path):
    arguments = ["evaluate", f"--workdir={tmp_path / 'later'}", "--watch"]
    with running.start([sys.executable, "-m", "lowrank_jax", *arguments]) as process:
        assert process.stdout.readline().startswith("waiting for")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert (process.returncode, output) == (75, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=7"], "has no step 7; there are ["),
        (["--step=lates"], "has no step lates"),
        (["--watch", "--step=best"], "leave out --step and --json"),
        (["--split=tset"], "digits has no split 'tset'; did you mean test?"),
    ],
)
def test_evaluate_refuses_what_is_not_there(trained, arguments, message):
    result = lowrank("evaluate", f"--workdir={trained}", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_evaluate_says_so_when_the_newest_checkpoint_is_damaged(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    step = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for file in step.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    result = lowrank("evaluate", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert f"checkpoint {step.name} is damaged" in result.stdout and step.is_dir()
    assert lowrank("evaluate", f"--workdir={tmp_path / 'run'}", f"--step={step.name}").returncode == 2


def test_overview_names_every_kernel_without_touching_data(tmp_path):
    result = lowrank("overview", CONFIG, "--config.lowrank.scale=0.1", f"--config.dataset.data_dir={tmp_path / 'none'}")
    assert result.returncode == 0, result.stderr
    assert "stage1/block1/conv1/kernel" in result.stdout and "kept dense by rule 1" in result.stdout
    assert not (tmp_path / "none").exists()


def test_overview_shows_a_mesh_that_is_not_there():
    axes = ("--config.mesh.fsdp=2", "--config.mesh.model=2")
    sixteen = lowrank("overview", CONFIG, *axes, "--devices=16")
    assert sixteen.returncode == 0, sixteen.stderr
    assert "mesh data 4 x fsdp 2 x model 2" in sixteen.stdout
    assert re.search(r"stage1/block1/conv1/kernel/u +3x3x16x4 +-, -, model\*fsdp, - +3x3x4x4 +576", sixteen.stdout)
    three = lowrank("overview", CONFIG, *axes, "--devices=3")
    assert three.returncode == 2 and "a mesh of -1x2x2 does not fit 3 devices" in three.stderr


def test_a_wrong_config_gets_all_its_problems_and_status_2(tmp_path):
    result = lowrank("train", CONFIG, "--config.lowrank.scael=0.1", "--config.batch_size", "-3", f"--workdir={tmp_path / 'w'}")
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].endswith("digits_resnet.py: 2 problems")
    assert "lowrank.scael: unknown key; did you mean lowrank.scale?" in result.stderr
    assert "batch_size: -3; must be at least 1" in result.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lowrank.rules=({'path': 'stm/.*'},)", "rule 'stm/.*' matches no parameter; the nearest is 'stem/conv/kernel'"),
        ("optim.decay_rules=(('.*/kernl', 1.0), ('.*', 0.0))", "optim.decay_rules: rule '.*/kernl' matches no parameter"),
        ("mesh.data=3", "mesh.data: a mesh of 3x1x1 does not fit 1 devices"),
        ("model.kwargs.blocks=(1, 1)", "model or lowrank"),
    ],
)
def test_parts_that_do_not_fit_together_are_config_problems_too(tmp_path, override, message):
    result = lowrank("train", CONFIG, f"--config.{override}", f"--workdir={tmp_path / 'w'}")
    assert result.returncode == 2
    assert message in result.stderr


def test_a_work_directory_of_another_experiment_is_refused(trained):
    result = running.run(running.command(trained, steps=200, eval__every="50 steps", lowrank__scale=0.5))
    assert result.returncode == 2
    assert "belongs to another experiment: lowrank.scale is 0.25 there, 0.5 here" in result.stderr


def test_data_that_is_not_there_is_no_traceback(tmp_path):
    config = f"--config={running.ROOT / 'configs' / 'fashion_mnist_mlp.py'}"
    result = lowrank("train", config, f"--config.dataset.data_dir={tmp_path}", f"--workdir={tmp_path / 'w'}")
    assert result.returncode == 2
    assert "fashion_mnist is not prepared under" in result.stderr and "scripts/prepare_fashion_mnist.sh" in result.stderr


def test_a_file_that_cannot_be_written_is_no_traceback(trained, tmp_path):
    result = lowrank("evaluate", f"--workdir={trained}", f"--json={tmp_path / 'no' / 'out.json'}")
    assert result.returncode == 2
    assert "out.json: No such file or directory" in result.stderr


def test_divergence_has_a_status_of_its_own(tmp_path):
    result = running.run(running.command(tmp_path, optim__lr=1e30, optim__warmup="0 steps", model__kwargs={"widths": (8,)}))
    assert result.returncode == 4, result.stderr
    assert "There is no checkpoint yet. Lower optim.lr or set optim.clip_norm." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["sweep"], ["report"]])
def test_help_has_examples(command):
    result = lowrank(*command, "--help")
    assert result.returncode == 0
    assert "exit status" in result.stdout or "examples" in result.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["tain"], ["train"], ["train", CONFIG, "--workdri=x"], ["train", CONFIG, "--workdir=x", "--config.seed"]]
)
def test_a_wrong_command_line_has_status_2(arguments):
    result = lowrank(*arguments)
    assert result.returncode == 2
    assert result.stderr


def test_report_prints_the_table_and_where_the_page_is(trained, tmp_path):
    result = lowrank("report", trained, f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    header, row, *_ = (line.split() for line in result.stdout.splitlines())
    assert header[:5] == ["scale", "arm", "params", "MACs", "top-1"] and row[1] == "kernel_projection"
    assert str(tmp_path / "out" / "report.html") in result.stdout.splitlines()
    missing = lowrank("report", tmp_path / "nowhere")
    assert missing.returncode == 2 and "nowhere is not a folder" in missing.stderr


def test_init_report_prints_a_table_and_writes_three_files(tmp_path):
    changes = ["--config.model.name=mlp", "--config.model.kwargs={'widths': (32,)}", "--config.lowrank.rules=()"]
    out = tmp_path / "report"
    flags = ["--scales=0.1", "--methods=spectral,kernel_projection", "--batch-size=4", f"--out={out}"]
    result = lowrank("init-report", CONFIG, *changes, *flags)
    assert result.returncode == 0, result.stderr
    assert "mean relative risk" in result.stdout and result.stdout.splitlines()[-1] == f"{out}.png"
    assert "--methods=spectral,kernel_projection" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scales=a"], "'a' is no list of numbers such as 0.05,0.1"),
        (["--seeds=0"], "'0' must be a whole number of at least 1"),
        (["--methods=sectral"], "unknown 'sectral'; did you mean spectral?"),
        (["--out=/proc/nowhere/report", "--scales=0.1", "--methods=spectral"], "/proc/nowhere"),
    ],
)
def test_init_report_refuses_what_it_cannot_do(flags, message):
    result = lowrank("init-report", CONFIG, *flags)
    assert result.returncode == 2
    assert message in result.stderr
