import importlib.util
import json
import re
import signal
import sys

import jax
import pytest

from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.preflight.compiler import PreflightError, believable_seconds, compile_program, programs, topology
from lowrank_jax.experiment.training.build import build
from lowrank_jax.planning.chips import CHIPS
from tests import running

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
V5E = CHIPS["v5e"]


def test_the_programs_of_a_run_are_estimated():
    experiment = build(running.config(lowrank__method="none", model__kwargs={"widths": (32,)}))
    compiled = {name: compile_program(lower(), V5E) for name, lower in programs(experiment).items()}
    assert list(compiled) == ["training step", "evaluation", "initialiser"]
    step, evaluation = compiled["training step"], compiled["evaluation"]
    # 4 of 32 images: forward, and two products of the same size backward; at least.
    assert step.cost.flops > 3 * 2 * 4 * experiment.plan.macs
    # Gradients go over all devices; evaluation exchanges four sums.
    assert step.cost.collectives["all-reduce"] >= 4 * experiment.plan.params
    assert evaluation.cost.collectives == {"all-reduce": 16}
    assert step.peak_bytes > evaluation.peak_bytes > 0


def test_without_the_compiler_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(PreflightError, match=r"libtpu, .* is not installed: pip install 'lowrank_jax\[tpu-preflight\]'"):
        topology("v5e:2x4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:9x9", "v5e has no topology '9x9'; known: 1x1, 2x2"),
        ("v5:4x4", "unknown generation 'v5'; did you mean v5"),
        ("v5e", "'v5e': expected GENERATION:TOPOLOGY, for example v5e:4x4"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(name, message):
    with pytest.raises(PreflightError, match=message):
        topology(name)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("v3:2x2", 8, "TPU v3"),  # two cores a chip
        ("v4:2x2x2", 8, "TPU v4"),
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v5e:2x4", 8, "TPU v5 lite"),
        ("v5p:4x8x8", 256, "TPU v5"),
        ("v6e:16x16", 256, "TPU v6 lite"),
    ],
)
def test_every_generation_has_its_devices(name, count, kind):
    devices = topology(name)
    assert (len(devices), devices[0].device_kind, devices[0].platform) == (count, kind, "tpu")
    assert len({device.process_index for device in topology("v5e:2x4/4")}) == 2


# A product of 1 TFLOP takes a v5e 5.1 ms at least.
@pytest.mark.parametrize(
    ("estimate", "untimed", "seconds", "doubt"),
    [
        (0.0071, 0, 0.0071, ""),
        (-1.9929, 2, 0.0071, ""),  # of two operations the compiler has no time and charges -1 s each
        (-1.9929, 0, None, "it is -1.99 s, with 0 operations charged"),
        (-0.9929, 2, None, "it is -0.993 s, with 2 operations charged"),
        (0.0071, 2, None, "it is 0.0071 s, with 2 operations charged"),
        (0.0001, 0, None, "the FLOPs alone take 0.00508 s"),
        (-1.9999, 2, None, "the FLOPs alone take 0.00508 s"),
        (-0.0, 0, None, "the FLOPs alone"),
        (float("nan"), 0, None, "the compiler gives none"),
        (float("-inf"), 3, None, "the compiler gives none"),
        (-9999.9929, 10000, None, "leave too few digits"),
    ],
)
def test_a_time_that_cannot_be_is_not_believed(estimate, untimed, seconds, doubt):
    found, why = believable_seconds(estimate, untimed, 1e12, V5E)
    assert found == (seconds if seconds is None else pytest.approx(seconds)) and doubt in why


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
def test_what_the_compiler_charges_for_operations_without_a_time_is_known():
    """At full effort this step has two such operations; without them its time is near that of least effort."""
    experiment = build(
        running.config(lowrank__method="none", batch_size=2048, model__kwargs={"widths": (512, 512)}),
        devices=topology("v5e:2x4"),
    )
    lowered = experiment.lower_train_step()
    fast, full = (compile_program(lowered, V5E, effort).cost for effort in ("fast", "full"))
    assert fast.seconds and full.seconds and 0.3 < full.seconds / fast.seconds < 3
    assert fast.flops == pytest.approx(full.flops, rel=0.01)


class Lowered:
    """A program that the compiler refuses."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.48G hbm. Exceeded by 1.77G.",
            17.25 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: the program (2.5T) exceeds available HBM", 2.5 * 2**40),
        ("RESOURCE_EXHAUSTED: the program (512) exceeds available HBM", 512),
    ],
)
def test_a_program_that_does_not_fit_says_what_it_needs(message, needed):
    program = compile_program(Lowered(message), V5E)
    assert program.peak_bytes == needed and program.cost is None


def test_a_compiler_that_fails_for_another_reason_is_no_lack_of_memory():
    with pytest.raises(PreflightError, match=r"the compiler failed: INTERNAL: something broke$"):
        compile_program(Lowered("INTERNAL: something broke\nat length"), V5E)


def command(*arguments, **changes):
    """The command on a small network."""
    changes = {"lowrank__rules": (), "model__kwargs": {"widths": (16,)}, **changes}
    settings = {key: value for key, value in running.settings(epochs=None, **changes).items() if value != "swept"}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    file = running.ROOT / "configs" / "digits_resnet.py"
    return [sys.executable, "-m", "lowrank_jax", "preflight", f"--config={file}", *flags, *arguments]


def preflight(*arguments, **changes):
    result = running.run(command(*arguments, **changes))
    assert "Traceback" not in result.stderr, result.stderr
    return result


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
def test_the_command_compiles_remembers_and_says_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = preflight("--topology=v5e:2x2", f"--json={tmp_path / 'out.json'}")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("TPU v5e 2x2, 4 chips, global batch 32 (8 per chip); compiler estimates, nothing was run")
    assert first.stderr.count("compiling") == 6
    written = json.loads((tmp_path / "out.json").read_text())
    dense, low = written["arms"]
    assert (dense["name"], low["name"], low["dense_twin"]) == ("dense twin", "scale=0.25", "dense twin") and written["fits"]
    assert 0 < low["ratio"]["state_bytes"] < 1 and low["programs"]["training step"]["cost"]["collectives"]["all-reduce"] > 0

    # 2**28 images of 64 bytes, and what is made of them, are more than a chip has; the smaller batch is known by now.
    second = preflight("--topology=v5e:2x2", "--sweep=batch_size=32,1073741824", batch_size="swept")
    assert second.returncode == 3, second.stderr
    assert "batch_size=1073741824 does not fit: its training step needs" in second.stdout
    assert all("1073741824" in line for line in second.stderr.splitlines() if "compiling" in line)
    assert "batch_size=32: training step: cached by an earlier preflight" in second.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
def test_a_budget_of_seconds_gets_the_rest_of_the_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    budget = {
        "lowrank__budget__seconds": 0.95,
        "lowrank__budget__chip": "v5e",
        "lowrank__budget__min_scale": 0.0,
        "lowrank__dense_warmup": "5 steps",
    }
    wide = {"model__kwargs": {"widths": (256, 256)}, "batch_size": 1024}
    found = preflight("--topology=v5e:2x2", f"--json={tmp_path / 'out.json'}", **budget, **wide)
    assert found.returncode == 0, found.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert [arm["name"] for arm in written["arms"]] == ["dense warm-up", "budget.seconds=0.95"]
    (rest,) = written["rests"]
    assert 0 < rest["kernels"] < rest["step"] and rest["rest"] == pytest.approx(rest["step"] - rest["kernels"], rel=0.01)
    flags = f"--config.lowrank.budget.rest={rest['rest']:g} --config.lowrank.budget.batch=256"
    assert found.stdout.splitlines()[-1].endswith(flags)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
def test_an_interrupted_command_does_not_wait_for_the_compiler(tmp_path):
    process = running.start(command("--topology=v5e:2x2", "--no-cache", f"--json={tmp_path / 'out.json'}"))
    said = ""
    while "compiling" not in said:
        said = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "lowrank: interrupted" in said and "Traceback" not in said
    assert not re.search(r": \d+ s$", said, re.MULTILINE)  # nothing has been compiled meanwhile
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:4x5"], "v5e has no topology '4x5'; did you mean 4x"),
        (["--topology=v5e:4x4", f"--json={running.ROOT}"], f"{running.ROOT}: Is a directory"),
        # Before the compiler is looked for.
        (["--topology=v5e:4x4", "--sweep=lowrank.scael=0.1"], "lowrank.scael: unknown key; did you mean lowrank.scale?"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(command(f"--json={tmp_path / 'out.json'}", *arguments)[3:])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
