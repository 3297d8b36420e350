"""The time per trial of a sweep, compared with running the same command by hand.

Both train the same few short runs with the same warm compilation cache.  The sweep forks its children from a process that has
imported everything.

    python -m benchmarks.sweep_overhead
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks.turns import ratio, take_turns

TRIALS, TURNS = 4, 3
CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "digits_resnet.py"
LENGTH = ["--config.epochs=none", "--config.steps=60"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(home / "cache"), "TFDS_DATA_DIR": str(home / "data")}
        turn = iter(range(10**6))

        def lowrank(*arguments: str) -> None:
            command = [sys.executable, "-m", "lowrank_jax", *arguments, f"--config={CONFIG}", *LENGTH]
            subprocess.run(command, env=environment, check=True, capture_output=True)

        def by_hand() -> None:
            workdir = home / str(next(turn))
            for seed in range(TRIALS):
                lowrank("train", f"--config.seed={seed}", f"--workdir={workdir / str(seed)}")

        def sweep(jobs: int) -> None:
            lowrank("sweep", f"--sweep=seed=0:{TRIALS}", f"--workdir={home / str(next(turn))}", f"--jobs={jobs}")

        runs = {"by hand": by_hand, "sweep": lambda: sweep(1), "sweep, two at a time": lambda: sweep(2)}
        times = take_turns(runs, TURNS)
        for name, seconds in times.items():
            each = statistics.median(seconds) / TRIALS
            print(f"{name:20} {each:5.2f} s per trial   ratio to by hand {ratio(times, name, 'by hand'):.2f}")


if __name__ == "__main__":
    main()
