"""Factor pairs in `flax.serialization`: state dicts, bytes, msgpack.

A state dict has the factors alone: those who walk over trees by it expect a leaf for every array and no others.  Which axes are
rows, and how the layer runs, comes from the target; without one, from a plan (`lowrank_jax.unflatten`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import serialization

from lowrank_jax.kernel import LowRankKernel


def _to_state_dict(pair: LowRankKernel) -> dict[str, Any]:
    return {name: serialization.to_state_dict(getattr(pair, name)) for name in ("u", "v")}


def _from_state_dict(target: LowRankKernel, state: Any) -> LowRankKernel:
    place = serialization.current_path()
    if not isinstance(state, Mapping) or set(state) != {"u", "v"}:
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{place}: expected the factors u and v of a LowRankKernel, found {found}")
    factors: Any = {name: serialization.from_state_dict(getattr(target, name), state[name], name=name) for name in ("u", "v")}
    restored = dataclasses.replace(target, **factors)
    for name in ("u", "v"):
        old, new = (getattr(getattr(pair, name), "shape", None) for pair in (target, restored))
        if old is not None and new is not None and len(old) != len(new):
            raise ValueError(f"{place}: {name} has shape {list(new)}, not that of rows {target.rows}: {list(old)}")
    return restored


serialization.register_serialization_state(LowRankKernel, _to_state_dict, _from_state_dict, override=True)
