"""Writes docs/results/preflight.md: what the ImageNet configs take of TPU slices, by the TPU's own compiler.

    python -m scripts.preflight_results

Needs libtpu (pip install 'lowrank_jax[train,tpu-preflight]') and no TPU.  Compiled programs are remembered, and how long the
command took for each config in docs/results/preflight.json, so that the same command goes on where it was stopped.
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
from lowrank_jax.experiment.preflight import arms
from lowrank_jax.experiment.preflight.arms import Cache, Compiler, Wanted
from lowrank_jax.experiment.preflight.compiler import PreflightError, Program, versions
from lowrank_jax.experiment.preflight.compiler import topology as topology_devices
from lowrank_jax.experiment.preflight.report import Report, exchanged, flops, memory, moved, ratio, roofline_seconds, run, time
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
SHARE = 64  # images a chip, on slices of 4, 16, 64 and 256
GROWING = (("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"), ("v4:2x2x1", "v4:2x2x4", "v4:4x4x4", "v4:4x8x8"))

SIZED_ON = "v5e:4x4"
SCALES = ("0.05", "0.25")
SIZED = {
    "configs/imagenet_resnet50_lowrank.py": SCALES,
    "configs/imagenet_efficientnet_lowrank.py:b0": SCALES,
    "configs/imagenet_vit_lowrank.py": SCALES,
}

HEAD = """# What training takes of TPU slices

All figures are estimates of the TPU's compiler (libtpu {libtpu}, jax {jax}) for one chip; nothing ran. `python -m
scripts.preflight_results` writes this page. Ratios in brackets are to the dense twin.

* training step, evaluation, initialiser: memory at the worst moment of each program, with what else lies on the chip then;
  largest: of what a program can have, 15.75 GiB on v5e and 30.75 GiB on v4. State: parameters, statistics, the optimiser's
  state and averages.
* roofline: the longer of FLOPs / peak and bytes / bandwidth, without exchanges between chips; the images per second, of the
  whole slice, follow from it. The compiler's own estimate of the time is beside it, where it can be believed.
* collectives: bytes of the arrays that are summed or gathered.

## The shipped configs

`lowrank preflight --config=CONFIG --topology=SLICE` at effort `fast`, every config at its own batch size. The last column is
how long it took on two cores, with nothing remembered from earlier ones.
"""

STOPPED = "\n**Not complete:** the command was stopped here; given again, it goes on.\n"


class Slices:
    """The compilers of slices by name and effort, all with the one cache of the command line."""

    def __init__(self):
        self._known: dict[tuple[str, str], Compiler] = {}
        self.cache = Cache(cache_home() / "preflight")

    def compiler(self, topology: str, effort: str = "fast") -> Compiler:
        if (topology, effort) not in self._known:
            devices = topology_devices(topology)
            chip = chips.of_device(devices[0])
            assert chip is not None
            self._known[topology, effort] = Compiler(topology, devices, chip, effort, self.cache, say)
        return self._known[topology, effort]

    def report(self, file: str, topology: str) -> tuple[Report, float]:
        """What `lowrank preflight` shows, and how many seconds it took."""
        say(f"== {file} {topology}")
        seconds = self._timed(file, topology)
        given = parsed(file)
        wanted = Wanted("dense" if given.lowrank.method == "none" else "low rank", given)
        report = run([wanted], topology, source=file, effort="fast", cache=self.cache, say=say)
        return report, seconds

    def _timed(self, file: str, topology: str) -> float:
        """Of the command without what earlier ones left; what it leaves is kept."""
        known = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
        name = f"{file} {topology}"
        if name not in known:
            with tempfile.TemporaryDirectory() as empty:
                command = [sys.executable, "-m", "lowrank_jax", "preflight", f"--config={file}", f"--topology={topology}"]
                begin = clock.perf_counter()
                ended = subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": empty}, stdout=subprocess.DEVNULL)
                if ended.returncode not in (0, DOES_NOT_FIT):
                    sys.exit(ended.returncode)  # it has said why
                known[name] = round(clock.perf_counter() - begin, 1)
                answers = pathlib.Path(empty) / cache_home().name / "preflight"
                shutil.copytree(answers, cache_home() / "preflight", dirs_exist_ok=True)
            SECONDS.write_text(json.dumps(known, indent=1) + "\n")
        return known[name]

    def step(self, file: str, topology: str, effort: str = "fast", **changes: str) -> tuple[Experiment, Program]:
        """The training step alone of a config with other settings; `a__b` sets "a.b"."""
        compiler = self.compiler(topology, effort)
        built = build(arms.check(parsed(file, **changes), file, len(compiler.devices)), file, compiler.devices)
        return built, compiler.program(f"{file} {topology} {changes} {effort}", built.lower_train_step)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parsed(file: str, **changes: str) -> Config:
    return config.read(file, {key.replace("__", "."): text for key, text in changes.items()})


def shipped(slices: Slices, file: str) -> str:
    """Two tables of a config on all slices."""
    reports = {topology: slices.report(file, topology) for topology in SLICES}
    first, _ = next(iter(reports.values()))
    memory_rows = [["slice", *first.memory_rows()[0], "took"]]
    step_rows = [["slice", *first.step_rows()[0]]]
    for topology, (report, seconds) in reports.items():
        dense, *others = report.memory_rows()[1:]
        memory_rows += [[topology, *dense, f"{seconds:.0f} s"], *([topology, *row, ""] for row in others)]
        step_rows += [[topology, *row] for row in report.step_rows()[1:]]
    tables = f"{markdown_table(memory_rows)}\n\n{markdown_table(step_rows)}"
    return f"### {file}\n\nBatch {first.arms[0].batch_size}.\n\n{tables}\n"


def weak_scaling(slices: Slices) -> str:
    """The training step on more and more chips, each with as many images."""
    rows = [["slice", "chips", "arm", "memory", "FLOPs", "bytes", "collectives"]]
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
        f"## Weak scaling\n\nThe training step of `{SCALED}` and of its dense twin with {SHARE} images on every chip, from 4 "
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
        rows = [["scale", "parameters", "MACs an image", "state", "memory", "FLOPs", "roofline"]]
        chip, dense = slices.compiler(SIZED_ON).chip, None
        for scale in ("dense", *scales):
            changes = {"lowrank__method": "none"} if scale == "dense" else {"lowrank__scale": scale}
            built, program = slices.step(file, SIZED_ON, **changes)
            assert program.cost is not None, f"{file} {scale} does not fit"
            values = (
                built.plan.params, built.plan.macs, arms.device_bytes(built.shapes), program.peak_bytes,
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
    """What effort `full` says of the same programs."""
    rows = [["arm", "effort", "memory", "FLOPs", "bytes", "compiler's time", "compiling"]]
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
