"""Where arrays live: a mesh of devices, and the shard of every array on each of them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.experiment.guided import GUIDE, is_guided
from lowrank_jax.kernel import LowRankKernel, is_low_rank
from lowrank_jax.paths import first_match, map_named, named_leaves
from lowrank_jax.patterns import compile_pattern
from lowrank_jax.text import did_you_mean

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")
# The mesh axes that shard one array axis, outer first: with the fsdp shards gathered, a device has one contiguous piece.
_TOGETHER = ("model", "fsdp")

Entry = tuple[str, ...]
"""The mesh axes that shard one axis of an array, outer first; empty for none."""


def mesh_sizes(devices: int, data: int = -1, fsdp: int = 1, model: int = 1) -> tuple[int, int, int]:
    """Devices along each axis; an axis given as -1 takes those that the others leave.  Checked by `config`."""
    sizes = [data, fsdp, model]
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // math.prod(size for size in sizes if size != -1)
    return sizes[0], sizes[1], sizes[2]


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the given devices, by default all of them; sizes as in `mesh_sizes`."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(len(devices), data, fsdp, model)
    # Explicit axes, jax's default, do not support decompositions of sharded arrays.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def absent_mesh(data: int, fsdp: int, model: int) -> Mesh:
    """A mesh of devices that need not exist: enough for shardings, not for computing."""
    mesh: Any = AbstractMesh((data, fsdp, model), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return mesh


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """The number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this process's part of a batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}


@dataclasses.dataclass(frozen=True)
class ShardingRule:
    """How to shard the parameters that a path matches.

    Attributes:
      path: a regular expression that matches the whole name of a parameter; for a factor pair, the kernel's.
      spec: for each axis of the parameter in the dense model, the mesh axes that shard it, outer first.  In a factor pair, u
        takes the entries of the kernel's row axes, v those of its column axes, and both those of the leading axes that
        `nn.scan` adds; a guide beside them takes all.  An empty spec replicates the parameter.
    """

    path: str
    spec: tuple[Entry, ...]


def read_rules(given: Sequence[Mapping[str, Any]]) -> tuple[tuple[ShardingRule, ...], list[str]]:
    """Rules from a config, such as `{"path": "head/kernel", "spec": ("fsdp", None)}`, and the problems with them.

    A spec that cannot be read is replaced by an empty one, so that the rest can still be checked.
    """
    rules, problems = [], []
    for entry in given:
        problems += [
            f"rule {dict(entry)}: unknown key {key!r}{did_you_mean(str(key), ('path', 'spec'))}"
            for key in entry
            if key not in ("path", "spec")
        ]
        path, spec = entry.get("path"), entry.get("spec")
        if not isinstance(path, str) or not isinstance(spec, list | tuple):
            example = '{"path": "head/kernel", "spec": ("fsdp", None)}'
            problems.append(f"rule {dict(entry)}: needs a path and a spec, e.g. {example}")
            continue
        try:
            compile_pattern(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            rules.append(ShardingRule(path, _read_spec(path, spec)))
        except ValueError as error:
            problems.append(str(error))
            rules.append(ShardingRule(path, ()))
    return tuple(rules), problems


def _read_spec(path: str, spec: Sequence[Any]) -> tuple[Entry, ...]:
    entries = tuple(() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec)
    for entry in entries:
        if not isinstance(entry, list | tuple):
            raise ValueError(f"rule {path!r}: {entry!r} must be None, a mesh axis or a tuple of mesh axes")
    names = [name for entry in entries for name in entry]
    for name in names:
        if name not in AXES:
            raise ValueError(f"rule {path!r}: there is no mesh axis {name!r}{did_you_mean(str(name), AXES)}")
        if names.count(name) > 1:
            raise ValueError(f"rule {path!r}: mesh axis {name!r} is used twice; it can shard an array only once")
    return tuple(map(tuple, entries))


def rule_problems(rules: Sequence[ShardingRule], params: Any, sizes: Mapping[str, int]) -> list[str]:
    """What does not fit between rules, a network and a mesh; a line for each parameter.

    Args:
      rules: in order.
      params: shapes of the parameters, dense or factored.
      sizes: devices along each mesh axis; missing axes are not checked.
    """
    leaves = named_leaves(params, is_leaf=is_low_rank)
    try:
        matches = first_match([rule.path for rule in rules], list(leaves))
    except ValueError as error:
        return str(error).splitlines()
    return [
        f"rule {rules[index].path!r}: {name} {list(leaves[name].shape)} {problem}"
        for name, index in matches.items()
        if index is not None and (problem := _misfit(rules[index].spec, leaves[name].shape, sizes))
    ]


def _misfit(spec: tuple[Entry, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> str | None:
    if not spec:
        return None
    if len(spec) != len(shape):
        return f"has {len(shape)} axes, the spec {len(spec)}"
    for axis, (entry, size) in enumerate(zip(spec, shape, strict=True)):
        parts = _parts(entry, sizes)
        if size % parts:
            return f"cannot be cut into {parts} parts along axis {axis} by {' and '.join(entry)}"
    return None


def state_shardings(state: Any, mesh: Mesh, rules: Sequence[ShardingRule] = ()) -> Any:
    """A sharding for every array of a `TrainState`, from its shapes (`jax.eval_shape`).

    A parameter follows the first rule that matches it, or else the automatic one (see `param_specs`).  What the optimiser or
    an average stores for a parameter is sharded like the parameter; everything else, such as counters and BatchNorm's
    statistics, like a parameter without a rule.
    """
    specs, params = param_specs(state.params, mesh.shape, rules), named_leaves(state.params)

    def place(name: str, leaf: Any) -> NamedSharding:
        param = _param_of(name, params)
        if param is None or params[param].shape != leaf.shape:
            return NamedSharding(mesh, _automatic(leaf.shape, mesh.shape))
        return NamedSharding(mesh, specs[param])

    return map_named(place, state)


def _param_of(name: str, params: Mapping[str, Any]) -> str | None:
    """The parameter whose name ends a leaf's name: "head/kernel" for "opt_state/0/trace/head/kernel"."""
    parts = name.split("/")
    return next((suffix for start in range(len(parts)) if (suffix := "/".join(parts[start:])) in params), None)


def param_specs(params: Any, sizes: Mapping[str, int], rules: Sequence[ShardingRule] = ()) -> dict[str, PartitionSpec]:
    """The spec of every array of the parameters, by name; a pair has one for each factor, and its guide the dense kernel's.

    Without a rule, the model and fsdp axes shard a factor along its longest axis that they divide, never along the rank.
    """
    leaves = named_leaves(params, is_leaf=is_low_rank)
    matches = first_match([rule.path for rule in rules], list(leaves))
    specs = {}
    for name, leaf in leaves.items():
        index = matches[name]
        spec = None if index is None else rules[index].spec
        whole = _automatic(leaf.shape, sizes) if spec is None else _partition(spec, sizes)
        if is_guided(leaf):
            specs[f"{name}/{GUIDE}"] = whole
        if not is_low_rank(leaf):
            specs[name] = whole
        elif spec is None:
            depth = len(leaf.stack)
            specs[f"{name}/u"] = _automatic(leaf.u.shape, sizes, range(depth, leaf.u.ndim - 1))
            specs[f"{name}/v"] = _automatic(leaf.v.shape, sizes, range(depth + 1, leaf.v.ndim))
        else:
            specs[f"{name}/u"], specs[f"{name}/v"] = _split(spec, leaf, sizes)
    return specs


def _split(spec: tuple[Entry, ...], pair: LowRankKernel, sizes: Mapping[str, int]) -> tuple[PartitionSpec, PartitionSpec]:
    """The specs of u and v from the spec of their kernel."""
    if not spec:
        return PartitionSpec(), PartitionSpec()
    depth, view = len(pair.stack), pair.view
    stack, kernel = spec[:depth], spec[depth:]
    rows, columns = tuple(kernel[axis] for axis in view.rows), tuple(kernel[axis] for axis in view.columns)
    return _partition((*stack, *rows, ()), sizes), _partition((*stack, (), *columns), sizes)


def _partition(spec: Sequence[Entry], sizes: Mapping[str, int]) -> PartitionSpec:
    """As a PartitionSpec, without mesh axes of size 1."""
    cutting = [tuple(name for name in entry if sizes[name] > 1) for entry in spec]
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in cutting))


def _automatic(shape: tuple[int, ...], sizes: Mapping[str, int], axes: Iterable[int] | None = None) -> PartitionSpec:
    """Shards the longest axis, of `axes` if given, over as much of the mesh as divides it, and the next one over the rest.

    The fsdp axis does not shard arrays of one axis: they are small, and each would have to be gathered.
    """
    spec: list[Entry] = [()] * len(shape)
    left = _TOGETHER if len(shape) > 1 else ("model",)
    for axis in sorted(range(len(shape)) if axes is None else axes, key=lambda axis: -shape[axis]):
        candidates = (left, *((name,) for name in left))
        spec[axis] = next((names for names in candidates if shape[axis] % _parts(names, sizes) == 0), ())
        left = tuple(name for name in left if name not in spec[axis])
    return _partition(spec, sizes)


def _parts(names: Entry, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.get(name, 1) for name in names)


def bytes_per_device(shapes: Any) -> int:
    """Bytes on one device of arrays that are given as shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def gathered(shardings: Any) -> Any:
    """The shardings without the axes that shard a batch: those of parameters while a step computes with them."""

    def without(entry: Any) -> Entry:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return tuple(name for name in names if name not in BATCH_AXES)

    def gather(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(sharding.mesh, _partition(tuple(map(without, sharding.spec)), sharding.mesh.shape))

    return jax.tree.map(gather, shardings)
