"""PyTorch's files of tensors, read without PyTorch and without running what they say.

A file of `torch.save` is a pickle, and a pickle is a program.  The unpickler here knows the few names that a dict of tensors
needs, and answers them with descriptions of its own; any other name ends the reading.  Values are read afterwards, and nothing
is allocated that the file does not hold.
"""

import collections
import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lowrank_jax.text import first_line, shown

SUFFIXES = (".pth", ".pt", ".bin", ".tar")

_STORAGES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_NESTED = ("state_dict", "model_state_dict", "model")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before PyTorch 1.6
_DEEPEST = 64  # axes of a tensor
_FAILURES = (
    pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError,
    RecursionError, UnicodeDecodeError, struct.error, zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip


class _Storage(NamedTuple):
    """A piece of a file: what its elements are, what it is called, and how many it is said to have."""

    dtype: Any
    key: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save(model.state_dict(), path)` wrote, by name, in the file's order.

    A dict that has them under "state_dict", "model_state_dict" or "model" is opened.

    Args:
      path: of the file; of PyTorch 1.6 and newer, or of the format before.

    Raises:
      ValueError: the file is damaged, is none of PyTorch, or holds anything else than tensors by name.
      OSError: it cannot be read.
    """
    place = pathlib.Path(path)
    if place.is_dir():
        raise ValueError(f"{place} is a folder")
    with place.open("rb") as file:
        begin = file.read(4)
        file.seek(0)
        try:
            return _read_zip(file) if begin == b"PK\x03\x04" else _read_legacy(file)
        except _Refused as error:
            raise ValueError(f"{place}: {error}") from None
        except _FAILURES as error:
            raise ValueError(f"{place} is no file of PyTorch's tensors, or it is damaged: {first_line(error)}") from None


class _Refused(Exception):
    """The file holds what is not read."""


class _Unpickler(pickle.Unpickler):
    """Knows what a dict of tensors needs, and nothing else."""

    def __init__(self, file: Any, storage: Callable[[Any], _Storage]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None and module in ("torch", "torch.storage") and name in _STORAGES:
            known = _StorageType(name)
        if known is None:
            raise _Refused(
                f"it holds {shown(f'{module}.{name}')}, and only tensors are read, as no code of a file is run here; "
                "save the model's state_dict() alone"
            )
        return known

    def persistent_load(self, pid: Any) -> Any:
        return self._storage(pid)


class _StorageType(NamedTuple):
    name: str


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> _Tensor:
    del others  # whether it had a gradient, and hooks
    if not isinstance(storage, _Storage) or not all(isinstance(part, tuple) for part in (shape, strides)):
        raise _Refused("it has a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > _DEEPEST or any(type(n) is not int or n < 0 for n in numbers):
        raise _Refused("it has a tensor without a shape")
    return _Tensor(storage, offset, shape, strides)


def _parameter(data: Any, *others: Any) -> Any:
    del others
    return data


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_tensor"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


def _described(pid: Any) -> _Storage:
    """Of ("storage", type, key, location, size), and in the older format one more."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
        raise _Refused("it refers to something that is no tensor's storage")
    _, kind, key, _, size, *view = pid
    if not isinstance(key, str) or type(size) is not int or size < 0 or any(part is not None for part in view):
        raise _Refused("it has a storage without a size")
    return _Storage(np.dtype(_STORAGES[kind.name]), key, size)


def _read_zip(file: Any) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        found = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1 or len(set(names)) != len(names):
            raise _Refused("it is a zip archive, but none that PyTorch wrote")
        prefix = found[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise _Refused("it is a compressed zip archive, which PyTorch does not write")
        if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
            raise _Refused("its numbers are big-endian")
        tensors = _tensors(_Unpickler(io.BytesIO(archive.read(found[0])), _described).load())

        def values(storage: _Storage) -> np.ndarray:
            name = f"{prefix}data/{storage.key}"
            if name not in names or archive.getinfo(name).file_size != storage.size * storage.dtype.itemsize:
                raise _Refused(f"it lacks the values of its storage {shown(storage.key)}")
            return np.frombuffer(archive.read(name), storage.dtype)

        return _arrays(tensors, values)


def _read_legacy(file: Any) -> dict[str, np.ndarray]:
    def plain() -> Any:
        return _Unpickler(file, _described).load()

    if plain() != _MAGIC or plain() != _PROTOCOL:
        raise _Refused("it is no file of PyTorch's")
    system = plain()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("its numbers are big-endian")
    tensors = _tensors(plain())
    keys = plain()
    wanted = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or not wanted.keys() <= set(keys):
        raise _Refused("it does not say where its values are")
    read: dict[str, np.ndarray] = {}
    for key in keys:
        if key not in wanted:
            raise _Refused(f"it has a storage {shown(key)} that no tensor has")
        dtype, size = wanted[key].dtype, wanted[key].size
        (stored,) = struct.unpack("<q", file.read(8))
        if stored != size:
            raise _Refused(f"it lacks the values of its storage {shown(key)}")
        left = os.fstat(file.fileno()).st_size - file.tell()
        if size * dtype.itemsize > left:
            raise _Refused("it ends before its values do")
        read[key] = np.frombuffer(file.read(size * dtype.itemsize), dtype)
    return _arrays(tensors, lambda storage: read[storage.key])


def _tensors(loaded: Any) -> dict[str, _Tensor]:
    """What was unpickled, if it is tensors by name."""
    if isinstance(loaded, dict):
        inner = next((loaded[name] for name in _NESTED if isinstance(loaded.get(name), dict)), None)
        loaded = loaded if inner is None else inner
    if not isinstance(loaded, dict) or not loaded:
        raise _Refused("it holds no dict of tensors; save the model's state_dict()")
    others = [name for name, value in loaded.items() if not isinstance(name, str) or not isinstance(value, _Tensor)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise _Refused(f"{shown(others[0])}{more} is no tensor; save the model's state_dict() alone")
    return dict(loaded)


def _arrays(tensors: Mapping[str, _Tensor], values: Callable[[_Storage], np.ndarray]) -> dict[str, np.ndarray]:
    known: dict[str, tuple[_Storage, np.ndarray]] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage.key not in known:
            known[storage.key] = storage, values(storage)
        described, flat = known[storage.key]
        if described != storage:
            raise _Refused(f"its storage {shown(storage.key)} is described in two ways")
        arrays[name] = _view(name, tensor, flat)
    return arrays


def _view(name: str, tensor: _Tensor, flat: np.ndarray) -> np.ndarray:
    """A tensor's elements, copied in order; they are as many as the storage has at most."""
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    count = math.prod(tensor.shape)
    if count and (last >= len(flat) or count > len(flat)):
        raise _Refused(f"{shown(name)} reaches outside of its storage")
    if not count:
        return np.zeros(tensor.shape if max(tensor.shape) < 2**31 else (0,), flat.dtype)
    steps = tuple(stride * flat.itemsize for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)
    return np.array(view)
