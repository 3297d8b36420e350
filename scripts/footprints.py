"""Writes docs/footprints.md: what a training step of every shipped config takes, dense and at several scales.

    python -m scripts.footprints                                       # all; some 20 minutes on two cores
    python -m scripts.footprints configs/imagenet_efficientnet_lowrank.py:b4   # one more, or one anew

Needs libtpu (pip install 'lowrank_jax[tpu]') and no TPU.
"""

import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from lowrank_jax import config as configs
from lowrank_jax.plans import count, markdown_table
from lowrank_jax.preflight import PreflightError, footprint, topology
from lowrank_jax.schema import Config

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "footprints.md"
TOPOLOGY = "v5e:4x4"
HBM = 16 * 2**30  # of a v5e chip
SCALES = (0.05, 0.1, 0.25, 0.5)
FIELDS = ("params", "macs", "state_bytes", "peak_bytes", "flops")

HEAD = f"""# What a training step takes

Estimates of the TPU's compiler for one of the 16 chips of a {TOPOLOGY} slice, whose memory is 16 GiB, at the batch size of the
config; nothing ran. `python -m scripts.footprints` writes this page.

* params and MACs: of the network; MACs are those of one image's forward pass.
* state: what is kept between steps on every chip: parameters, statistics, the optimiser's state, averages.
* peak: memory at the worst moment of a step, the state included.
* FLOPs: of a step, on one chip.  The compiler computes some things twice where that saves memory, which differs between ranks.
* ratios: to the dense network.

"""


def arms(file: str, devices: int) -> dict[str, Config]:
    """The dense network and the factored ones of a config file."""
    changes = {"dense": {"lowrank.method": "none"}}
    changes |= {f"{scale:g}": {"lowrank.method": "kernel_projection", "lowrank.scale": str(scale)} for scale in SCALES}
    parsed = {}
    for name, values in changes.items():
        config = configs.load(file)
        for key, value in values.items():
            configs.override(config, key, value)
        parsed[name] = configs.parse(config, source=file, devices=devices)
    return parsed


def section(file: str, devices: Sequence[Any]) -> str:
    """A table for a config file."""
    rows, dense = [["scale", "params", "MACs", "state", "peak", "FLOPs"]], None
    networks = arms(file, len(devices))
    for name, config in networks.items():
        begin = time.monotonic()
        try:
            found = footprint(config, devices)
        except PreflightError as error:
            print(f"{file} {name}: {error}", file=sys.stderr, flush=True)
            rows.append([name, *["does not compile"] * len(FIELDS)])
            continue
        print(f"{file} {name}: {found} ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)
        dense = found if name == "dense" else dense
        rows.append([name, *(_cell(field, getattr(found, field), dense and getattr(dense, field)) for field in FIELDS)])
    batch = networks["dense"].batch_size
    return f"## {file}\n\nBatch {batch}, {batch // len(devices)} a chip.\n\n{markdown_table(rows)}\n"


def _cell(field: str, value: float, dense: float | None) -> str:
    text = _bytes(value) if field.endswith("bytes") else count(round(value))
    ratio = f" ({value / dense:.2f})" if dense and value != dense else ""
    return text + ratio + (", does not fit" if field == "peak_bytes" and value > HBM else "")


def _bytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"


def shipped() -> list[str]:
    """All configs; the dense ones of ImageNet are the dense rows of their low-rank twins."""
    files = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))
    return [file for file in files if file.replace(".py", "_lowrank.py") not in files]


def written() -> dict[str, str]:
    """The page's sections by config file."""
    _, *sections = PAGE.read_text().split("## ") if PAGE.exists() else [""]
    return {text.partition("\n")[0]: f"## {text.rstrip()}\n" for text in sections}


def main() -> None:
    try:
        devices = topology(TOPOLOGY)
        known = written()
        for file in sys.argv[1:] or shipped():
            known[file] = section(file, devices)
            PAGE.write_text(HEAD + "\n".join(known[file] for file in sorted(known)))
    except (PreflightError, configs.ConfigError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
