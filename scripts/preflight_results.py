"""Writes docs/results/preflight.md: what the ImageNet configs need of TPU slices, by the TPU's own compiler.

    python -m scripts.preflight_results

Needs libtpu (pip install 'lowrank_jax[train,tpu-preflight]') and no TPU.  Estimates are cached, and docs/results/preflight.json
keeps the time per config, so that the same command continues where it was stopped.
"""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time as clock

os.environ["JAX_PLATFORMS"] = "cpu"

from lowrank_jax.experiment import config
from lowrank_jax.experiment.cli.environment import cache_home
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.errors import DOES_NOT_FIT
from lowrank_jax.experiment.preflight.cache import Cache
from lowrank_jax.experiment.preflight.compiler import PreflightError, Program, versions
from lowrank_jax.experiment.preflight.compiler import topology as topology_devices
from lowrank_jax.experiment.preflight.estimate import Estimator, device_bytes
from lowrank_jax.experiment.preflight.networks import Network, check
from lowrank_jax.experiment.preflight.run import run
from lowrank_jax.experiment.preflight.table import Estimates, exchanged, flops, memory, moved, ratio, roofline_seconds, time
from lowrank_jax.experiment.training.build import Experiment, build
from lowrank_jax.planning import chips
from lowrank_jax.text import count, markdown_table

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "results" / "preflight.md"
SECONDS = PAGE.with_suffix(".json")
CONFIGS = (
    "configs/imagenet_resnet50.py",
    "configs/imagenet_resnet50_lowrank.py",
    "configs/imagenet_efficientnet.py:b0",
    "configs/imagenet_efficientnet_lowrank.py:b0",
    "configs/imagenet_vit_lowrank.py",
)
SLICES = ("v4:2x2x2", "v5e:4x4", "v5e:16x16")

SCALED = "configs/imagenet_resnet50_lowrank.py"
SHARE = 64  # images per chip, on slices of 4, 16, 64 and 256 chips
GROWING = (("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"), ("v4:2x2x1", "v4:2x2x4", "v4:4x4x4", "v4:4x8x8"))

SIZED_ON = "v5e:4x4"
SCALES = ("0.05", "0.25")
SIZED = {
    "configs/imagenet_resnet50_lowrank.py": SCALES,
    "configs/imagenet_efficientnet_lowrank.py:b0": SCALES,
    "configs/imagenet_vit_lowrank.py": SCALES,
}

HEAD = """# What training needs of TPU slices

All figures are estimates of the TPU's compiler (libtpu {libtpu}, jax {jax}) for one chip; nothing was run. `python -m
scripts.preflight_results` writes this page. In parentheses: ratio to the dense twin.

* training step, evaluation, initialiser: peak memory of each program, with everything else that is on the chip then;
  memory used: share of what a program can use, 15.75 GiB on v5e and 30.75 GiB on v4. State: parameters, statistics,
  optimiser state and averages.
* roofline: the larger of FLOPs / peak and bytes / bandwidth, without communication between chips; images per second (whole
  slice) follow from it. Next to it the compiler's own time estimate, where it is credible.
* collectives: bytes of the arrays that are reduced or gathered.

## The shipped configs

`lowrank preflight --config=CONFIG --topology=SLICE` at effort `fast`, every config at its own batch size. The last column is
the time of the command on two cores with an empty cache.
"""

STOPPED = "\n**Not complete:** the command was stopped here; run it again to continue.\n"


class Slices:
    """Compilers by slice and effort; they share the cache of the command line."""

    def __init__(self):
        self._known: dict[tuple[str, str], Estimator] = {}
        self.cache = Cache(cache_home() / "preflight")

    def compiler(self, topology: str, effort: str = "fast") -> Estimator:
        if (topology, effort) not in self._known:
            devices = topology_devices(topology)
            chip = chips.of_device(devices[0])
            assert chip is not None
            self._known[topology, effort] = Estimator(topology, devices, chip, effort, self.cache, say)
        return self._known[topology, effort]

    def estimates(self, file: str, topology: str) -> tuple[Estimates, float]:
        """What `lowrank preflight` shows, and its wall time in seconds."""
        say(f"== {file} {topology}")
        seconds = self._timed(file, topology)
        given = parsed(file)
        network = Network("dense" if given.lowrank.method == "none" else "low rank", given)
        estimates = run([network], topology, source=file, effort="fast", cache=self.cache, say=say)
        return estimates, seconds

    def _timed(self, file: str, topology: str) -> float:
        """The time of the command with an empty cache; its answers are then kept."""
        known = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
        name = f"{file} {topology}"
        if name not in known:
            with tempfile.TemporaryDirectory() as empty:
                command = [sys.executable, "-m", "lowrank_jax", "preflight", f"--config={file}", f"--topology={topology}"]
                begin = clock.perf_counter()
                ended = subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": empty}, stdout=subprocess.DEVNULL)
                if ended.returncode not in (0, DOES_NOT_FIT):
                    sys.exit(ended.returncode)  # it has printed why
                known[name] = round(clock.perf_counter() - begin, 1)
                answers = pathlib.Path(empty) / cache_home().name / "preflight"
                shutil.copytree(answers, cache_home() / "preflight", dirs_exist_ok=True)
            SECONDS.write_text(json.dumps(known, indent=1) + "\n")
        return known[name]

    def step(self, file: str, topology: str, effort: str = "fast", **changes: str) -> tuple[Experiment, Program]:
        """The training step of a config with changed settings; `a__b` sets "a.b"."""
        compiler = self.compiler(topology, effort)
        built = build(check(parsed(file, **changes), file, len(compiler.devices)), file, compiler.devices)
        return built, compiler.program(f"{file} {topology} {changes} {effort}", built.lower_train_step)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parsed(file: str, **changes: str) -> Config:
    return config.read(file, {key.replace("__", "."): text for key, text in changes.items()})


def shipped(slices: Slices, file: str) -> str:
    """Two tables for a config, on all slices."""
    found = {topology: slices.estimates(file, topology) for topology in SLICES}
    first, _ = next(iter(found.values()))
    memory_rows = [["slice", *first.memory_rows()[0], "took"]]
    step_rows = [["slice", *first.step_rows()[0]]]
    for topology, (estimates, seconds) in found.items():
        dense, *others = estimates.memory_rows()[1:]
        memory_rows += [[topology, *dense, f"{seconds:.0f} s"], *([topology, *row, ""] for row in others)]
        step_rows += [[topology, *row] for row in estimates.step_rows()[1:]]
    tables = f"{markdown_table(memory_rows)}\n\n{markdown_table(step_rows)}"
    return f"### {file}\n\nBatch {first.rows[0].batch_size}.\n\n{tables}\n"


def weak_scaling(slices: Slices) -> str:
    """The training step on more and more chips with the same number of images per chip."""
    rows = [["slice", "chips", "network", "memory", "FLOPs", "bytes", "collectives"]]
    deviations: dict[str, float] = {}
    for topologies in GROWING:
        for method in ("none", "kernel_projection"):
            programs = {}
            for topology in topologies:
                chips_ = str(SHARE * len(slices.compiler(topology).devices))
                _, programs[topology] = slices.step(
                    SCALED, topology, lowrank__method=method, batch_size=chips_, eval__batch_size=chips_
                )
            rows += [_scaled_row(topology, method, slices, program) for topology, program in programs.items()]
            for name, values in _figures(list(programs.values())).items():
                deviations[name] = max(deviations.get(name, 0.0), max(values) / min(values) - 1)
    text = ", ".join(f"{name} {100 * value:.2f} %" for name, value in deviations.items())
    return (
        f"## Weak scaling\n\nThe training step of `{SCALED}` and of its dense twin with {SHARE} images per chip, from 4 "
        f"to 256 chips, at effort `fast`.\n\n{markdown_table(rows)}\n\n"
        f"Largest deviation between 4 and 256 chips of one generation: {text}.\n"
    )


def _scaled_row(topology: str, method: str, slices: Slices, program: Program) -> list[str]:
    cost = program.cost
    assert cost is not None
    arm, devices = "dense" if method == "none" else "low rank", len(slices.compiler(topology).devices)
    figures = (memory(program.peak_bytes), flops(cost.flops), moved(cost.bytes), exchanged(cost.collectives, {}))
    return [topology, str(devices), arm, *figures]


def _figures(programs: list[Program]) -> dict[str, list[float]]:
    costs = [program.cost for program in programs if program.cost is not None]
    return {
        "memory": [program.peak_bytes for program in programs],
        "FLOPs": [cost.flops for cost in costs],
        "bytes": [cost.bytes for cost in costs],
        "collective bytes": [sum(cost.collectives.values()) for cost in costs],
    }


def sizes(slices: Slices) -> str:
    """The training step of every network at several scales."""
    sections = [f"## Sizes\n\nThe training step on {SIZED_ON} at several scales, effort `fast`.\n"]
    for file, scales in SIZED.items():
        rows = [["scale", "parameters", "MACs per image", "state", "memory", "FLOPs", "roofline"]]
        chip, dense = slices.compiler(SIZED_ON).chip, None
        for scale in ("dense", *scales):
            changes = {"lowrank__method": "none"} if scale == "dense" else {"lowrank__scale": scale}
            built, program = slices.step(file, SIZED_ON, **changes)
            assert program.cost is not None, f"{file} {scale} does not fit"
            values = (
                built.plan.params, built.plan.macs, device_bytes(built.shapes), program.peak_bytes,
                program.cost.flops, roofline_seconds(program.cost, chip),
            )  # fmt: skip
            dense = dense or values
            shown = (_counted, _counted, memory, memory, flops, time)
            cells = [ratio(text, value, twin) for text, value, twin in zip(shown, values, dense, strict=True)]
            rows.append([scale, *cells])
        sections.append(f"### {file}\n\n{markdown_table(rows)}\n")
    return "\n".join(sections)


def _counted(value: float) -> str:
    return count(round(value))


def efforts(slices: Slices) -> str:
    """The same programs at both efforts."""
    rows = [["network", "effort", "memory", "FLOPs", "bytes", "compiler's time", "compiling"]]
    for method in ("none", "kernel_projection"):
        for effort in ("fast", "full"):
            _, program = slices.step(SCALED, SIZED_ON, effort, lowrank__method=method)
            cost = program.cost
            assert cost is not None
            own = "-" if cost.seconds is None else time(cost.seconds)
            figures = (memory(program.peak_bytes), flops(cost.flops), moved(cost.bytes), own)
            rows.append(["dense" if method == "none" else "low rank", effort, *figures, f"{program.compile_seconds:.0f} s"])
    return f"## Efforts\n\nThe training step of `{SCALED}` on {SIZED_ON}.\n\n{markdown_table(rows)}\n"


def main() -> None:
    slices = Slices()
    parts = [*(functools.partial(shipped, file=file) for file in CONFIGS), weak_scaling, sizes, efforts]
    page = HEAD.format(**versions())
    try:
        for i, part in enumerate(parts):
            page += f"\n{part(slices)}"
            PAGE.write_text(page if i + 1 == len(parts) else page + STOPPED)
    except (PreflightError, config.ConfigError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
