"""Writes docs/footprints.md: what a training step of every shipped config takes, dense and at several scales.

    python -m scripts.footprints                              # all; 20 minutes on two cores
    python -m scripts.footprints configs/cifar10_resnet.py    # some, to look at: nothing is written

Needs libtpu (pip install 'lowrank_jax[tpu]') and no TPU.  What was compiled before is not compiled again.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

from lowrank_jax import config as configs
from lowrank_jax.plans import count, markdown_table
from lowrank_jax.preflight import Footprint, PreflightError, footprint, topology
from lowrank_jax.schema import Config
from lowrank_jax.workdir import config_digest

ROOT = pathlib.Path(__file__).parent.parent
TOPOLOGY = "v5e:4x4"
SCALES = (0.05, 0.1, 0.25, 0.5)
HBM = 16 * 2**30  # of a v5e chip
CACHE = ROOT / "runs" / "footprints.json"

HEAD = f"""# What a training step takes

Estimates of the TPU's compiler for one of the 16 chips of a {TOPOLOGY} slice, whose memory is 16 GiB, at the batch size of the
config; nothing ran. `python -m scripts.footprints` writes this page.

* params and MACs: of the network; MACs are those of one image's forward pass.
* state: what is kept between steps on every chip: parameters, statistics, the optimiser's state, averages.
* peak: memory at the worst moment of a step, the state included.
* FLOPs: of a step, on one chip.
* ratios: to the dense network.
"""


def arms(file: str) -> dict[str, Config]:
    """The dense network and the factored ones of a config file."""
    changes = {"dense": {"lowrank.method": "none"}}
    changes |= {f"{scale:g}": {"lowrank.method": "kernel_projection", "lowrank.scale": str(scale)} for scale in SCALES}
    parsed = {}
    for name, values in changes.items():
        config = configs.load(file)
        for key, value in values.items():
            configs.override(config, key, value)
        parsed[name] = configs.parse(config, source=file, devices=len(topology(TOPOLOGY)))
    return parsed


def compiled(config: Config) -> Footprint | str:
    """The footprint of a config, or why there is none; from the cache if it is there."""
    known = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    key = f"{TOPOLOGY} {config_digest(configs.to_dict(config))}"
    if key not in known:
        try:
            known[key] = dataclasses.asdict(footprint(config, topology(TOPOLOGY)))
        except PreflightError as error:
            known[key] = str(error)
        CACHE.parent.mkdir(exist_ok=True)
        CACHE.write_text(json.dumps(known, indent=1))
    return known[key] if isinstance(known[key], str) else Footprint(**known[key])


def section(file: str) -> str:
    """A table for a config file."""
    rows = [["scale", "params", "MACs", "state", "peak", "FLOPs"]]
    dense = None
    for name, config in arms(file).items():
        begin = time.monotonic()
        found = compiled(config)
        print(f"{file} {name}: {found} ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)
        if isinstance(found, str):
            rows.append([name, *["does not compile"] * 5])
            continue
        dense = dense or found
        rows.append([name, *(_against(getattr(found, field), getattr(dense, field), field) for field in FIELDS)])
    batch = next(iter(arms(file).values())).batch_size
    return f"## {file}\n\nBatch {batch}, {batch // 16} a chip.\n\n{markdown_table(rows)}\n"


FIELDS = ("params", "macs", "state_bytes", "peak_bytes", "flops")


def _against(value: float, dense: float, field: str) -> str:
    text = _bytes(value) if field.endswith("bytes") else count(round(value))
    over = " (does not fit)" if field == "peak_bytes" and value > HBM else ""
    return f"{text} ({value / dense:.2f}){over}" if value != dense else f"{text}{over}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"


def main() -> None:
    shipped = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))
    # The dense configs of ImageNet are the dense rows of their low-rank twins.
    shipped = [file for file in shipped if file.replace(".py", "_lowrank.py") not in shipped]
    files = sys.argv[1:] or shipped
    page = "\n".join([HEAD, *(section(file) for file in files)])
    if sys.argv[1:]:
        print(page)
    else:
        (ROOT / "docs" / "footprints.md").write_text(page)


if __name__ == "__main__":
    main()
