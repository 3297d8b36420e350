"""Whole runs: to the end, killed, stopped, resumed, damaged, diverged; real processes and real signals."""

import json
import signal

import jax
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.evaluation.runs import Evaluator
from lowrank_jax.experiment.training.build import build
from lowrank_jax.experiment.training.evaluate import evaluate
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.mixing import normalizer
from lowrank_jax.experiment.training.window import Diverged
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.paths import named_leaves
from tests import running

ALL_DEVICES = 8


def final_state(workdir, **changes):
    """Every array of the newest checkpoint by name, read on this process's devices."""
    experiment = build(running.config(**changes))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(experiment.shapes)
    assert not restored.damaged
    return restored.step, {name: np.asarray(leaf) for name, leaf in named_leaves(restored.state).items()}


def assert_bitwise_equal(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        np.testing.assert_array_equal(a[1][name], b[1][name], err_msg=name)


def wait_for(process, text):
    """Reads output until a line holds `text`; returns what was read."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came; output was:\n{seen}")


def test_kernels_are_projected_for_the_inputs_that_the_first_batches_give_them(tmp_path):
    settings = {"steps": 5, "log__every": "1 step", "lowrank__moment_batches": 2, "eval__batch_size": 360}
    aware = train(running.config(**settings), str(tmp_path / "aware"))
    again = train(running.config(**settings), str(tmp_path / "again"))
    plain = train(running.config(**{**settings, "lowrank__moment_batches": 0}), str(tmp_path / "plain"))
    assert aware.train[1]["train/loss"] == again.train[1]["train/loss"] != plain.train[1]["train/loss"]


def test_a_run_leaves_everything_behind_that_the_docs_promise(tmp_path):
    run = train(running.config(eval__every="20 steps"), str(tmp_path))
    assert not run.interrupted
    assert sorted(run.train) == [10, 20, 30, 40] and sorted(run.evals) == [20, 40]
    assert run.train[40]["train/loss"] < run.train[10]["train/loss"]

    lines = running.metrics(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 20, 30, 40, 40]
    assert {"train/loss", "train/top1", "train/grad_norm", "train/lr", "train/images_per_second"} <= lines[0].keys()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 40 and result["eval"] == run.evals[40]
    assert result["params"] == sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    assert {"params", "macs", "seconds", "versions", "config_digest"} <= result.keys()
    assert "dense1/kernel" in (tmp_path / "overview.txt").read_text()
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.05

    again = train(running.config(eval__every="20 steps"), str(tmp_path))  # nothing is left to do
    assert not again.interrupted and not again.train and not again.evals
    assert running.metrics(tmp_path) == lines


def test_tensorboard_reads_what_was_written(tmp_path):
    train(running.config(steps=10), str(tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (tensor,) = events.Tensors("train/loss")
    from tensorboard.util.tensor_util import make_ndarray

    np.testing.assert_allclose(make_ndarray(tensor.tensor_proto), running.metrics(tmp_path)[0]["train/loss"], rtol=1e-6)


def test_training_does_not_depend_on_the_devices(tmp_path):
    losses = {}
    for name, mesh in {
        "data": {},
        "fsdp": {"mesh__data": 2, "mesh__fsdp": 4},
        "all": {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2},
    }.items():
        run = train(running.config(steps=20, optim__accumulate=4, **mesh), str(tmp_path / name))
        losses[name] = [run.train[step]["train/loss"] for step in (10, 20)]
    one = running.run(running.command(tmp_path / "one", steps=20, optim__accumulate=4), devices=1)
    assert one.returncode == 0, one.stderr
    losses["one"] = [line["train/loss"] for line in running.metrics(tmp_path / "one") if "train/loss" in line]
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["one"], rtol=1e-4, err_msg=name)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    # Saved in the middle of the windows that are logged.
    steps = {"steps": 1200, "checkpoint__every": "70 steps", "log__every": "100 steps", "eval__every": "400 steps"}
    steps |= {"optim__ema_decay": 0.99, "dataset__random_erasing": 0.3, "optim__accumulate": 2}
    whole, broken = running.command(tmp_path / "whole", **steps), running.command(tmp_path / "broken", **steps)
    done = running.run(whole, devices=2)
    assert done.returncode == 0, done.stderr

    with running.start(broken, devices=2) as process:
        wait_for(process, "saved@490")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed = running.run(broken, devices=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout

    assert_bitwise_equal(*(final_state(tmp_path / name, optim__ema_decay=0.99) for name in ("whole", "broken")))
    evaluations = [[line for line in running.metrics(tmp_path / name) if "eval/top1" in line] for name in ("whole", "broken")]
    assert evaluations[0] == evaluations[1]  # each once, and the same
    losses = [
        {line["step"]: line["train/loss"] for line in running.metrics(tmp_path / name) if "train/loss" in line}
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


def test_a_state_saved_on_eight_devices_goes_on_with_one(tmp_path):
    whole = train(running.config(), str(tmp_path / "eight"))
    half = running.run(running.command(tmp_path / "moved", steps=40), devices=ALL_DEVICES)
    assert half.returncode == 0, half.stderr
    for step in (30, 40):
        (tmp_path / "moved" / "checkpoints" / str(step)).rename(tmp_path / str(step))  # back to step 20
    moved = running.run(running.command(tmp_path / "moved", steps=40), devices=1)
    assert moved.returncode == 0, moved.stderr
    assert "from step 20" in moved.stdout and "on 1 cpu device" in moved.stdout
    losses = {line["step"]: line["train/loss"] for line in running.metrics(tmp_path / "moved") if "train/loss" in line}
    np.testing.assert_allclose(losses[40], whole.train[40]["train/loss"], rtol=1e-4)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    steps = {"steps": 3000, "checkpoint__every": "100000 steps", "log__every": "100 steps"}
    with running.start(running.command(tmp_path, **steps)) as process:
        wait_for(process, "[ 300/3000")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert process.returncode == 75, output
    assert "stopping: saved step" in output and "the same command continues it" in output
    stopped_at = int(output.split("saved step ")[1].split()[0])
    assert 300 <= stopped_at < 3000
    resumed = running.run(running.command(tmp_path, **steps))
    assert resumed.returncode == 0, resumed.stderr
    assert f"from step {stopped_at} " in resumed.stdout


def test_sigterm_is_heard_during_an_evaluation(tmp_path):
    long_evaluation = {
        "dataset__name": "synthetic",
        "dataset__kwargs__image_shape": (8, 8, 1),
        "dataset__kwargs__test_size": 200_000,
        "eval__batch_size": 8,
        "eval__every": "10 steps",
        "checkpoint__every": "1000 steps",
    }
    with running.start(running.command(tmp_path, **long_evaluation)) as process:
        wait_for(process, "[10/40")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert process.returncode == 75, output
    assert "evaluated at step" not in output
    assert "stopping: saved step 10" in output


def test_a_stop_in_an_evaluation_does_not_change_which_step_is_best(tmp_path):
    config = running.config(steps=30, eval__every="10 steps", checkpoint__every="1000 steps", optim__lr=0.3)
    whole = train(config, str(tmp_path / "whole"))

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    for _ in range(2):  # in the first evaluation, and again in that of the same step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lowrank_jax.experiment.training.loop.evaluate", interrupted)
            assert train(config, str(tmp_path / "broken")).interrupted
    resumed = train(config, str(tmp_path / "broken"))
    assert resumed.evals == whole.evals
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "broken")]
    assert results[0]["best_step"] == results[1]["best_step"]
    with Checkpoints(tmp_path / "broken" / "checkpoints", read_only=True) as checkpoints:
        assert results[0]["best_step"] in checkpoints.steps()


@pytest.mark.parametrize("damage", ["flipped byte", "truncated"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path, damage, capsys):
    config = running.config()
    whole = train(config, str(tmp_path))
    expected = final_state(tmp_path)
    files = [path for path in (tmp_path / "checkpoints" / "40").rglob("d/*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    capsys.readouterr()

    again = train(config, str(tmp_path))
    output = capsys.readouterr().out
    assert f"{tmp_path}: checkpoint 40 is damaged (" in output and "using 30 instead" in output
    assert (tmp_path / "damaged" / "40").is_dir()
    assert sorted(again.train) == [40] and again.train[40]["train/loss"] == whole.train[40]["train/loss"]
    assert_bitwise_equal(final_state(tmp_path), expected)


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(tmp_path):
    config = running.config(
        optim__lr=1e30, optim__warmup="0 steps", model__kwargs={"widths": (8,)}, checkpoint__every="1 steps"
    )
    with pytest.raises(
        Diverged, match=r"is (nan|inf) at step \d+ .*Last good checkpoint: \d+.*Lower optim.lr or set optim.clip_norm"
    ):
        train(config, str(tmp_path))
    for path in (tmp_path / "checkpoints").iterdir():
        assert int(path.name) < 5
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(build(config).shapes)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state.params))


def test_the_best_checkpoint_is_chosen_on_the_held_out_part(tmp_path):
    run = train(
        running.config(dataset__train_split="train[:1200]", dataset__valid_split="train[1200:]", eval__every="10 steps"),
        str(tmp_path),
    )
    lines = [line for line in running.metrics(tmp_path) if "eval/top1" in line]
    assert [line["valid/examples"] for line in lines] == [237] * 4 and {line["eval/examples"] for line in lines} == {360}
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["valid"]["top1"] == lines[-1]["valid/top1"] and result["eval"] == run.evals[40]
    assert result["best_step"] == max(lines, key=lambda line: (line["valid/top1"], line["step"]))["step"]


def test_averaged_weights_are_what_is_evaluated_and_the_raw_ones_beside_them(tmp_path, capsys):
    run = train(running.config(optim__ema_decay=0.9), str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["eval"] == run.evals[40] != result["eval_raw"]
    experiment = build(running.config())
    arrays = datasets.load(experiment.dataset, "test", None)
    for name, variables in (("eval", run.state.ema), ("eval_raw", run.state.variables()["_raw"])):
        logits = lr.apply(
            experiment.model, variables, normalizer(experiment.dataset.mean, experiment.dataset.std)(arrays.images), train=False
        )
        assert (logits.argmax(-1) == arrays.labels).mean() == pytest.approx(result[name]["top1"], abs=1e-6)
    best = max((line for line in running.metrics(tmp_path) if "eval/top1" in line), key=lambda line: line["eval/top1"])
    assert result["best_step"] == best["step"]
    assert "evaluated the raw weights at step 40" in capsys.readouterr().out

    evaluation = Evaluator().evaluate(str(tmp_path))
    assert evaluation.metrics == pytest.approx(result["eval"], rel=1e-5)
    assert evaluation.raw_metrics == pytest.approx(result["eval_raw"], rel=1e-5)
    assert [line.split()[:3] for line in evaluation.table().splitlines()[1:]] == [
        ["test,", "averaged", "360"],
        ["test,", "raw", "360"],
    ]
