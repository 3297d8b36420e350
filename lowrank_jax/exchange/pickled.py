"""PyTorch's files of tensors, read without PyTorch and without running what they say (see `unpickle`).

Values are read once all of them are known to be in the file, and nothing is allocated that the file does not hold.
"""

import io
import math
import pathlib
import struct
import zipfile
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import numpy as np

from lowrank_jax.exchange.unpickle import Refused, Storage, Tensor, unpickle
from lowrank_jax.text import first_line, one_line, shown

SUFFIXES = (".pth", ".pt", ".bin", ".tar")

_NESTED = ("state_dict", "model_state_dict", "model")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before PyTorch 1.6
_REPEATED = 2**26  # bytes that tensors which repeat their elements may have beside those in the file
_FAILURES = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


def read(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save(model.state_dict(), path)` wrote, by name, in the file's order.

    A dict that has them under "state_dict", "model_state_dict" or "model" is opened.

    Args:
      path: of the file; of PyTorch 1.6 and newer, or of the format before.

    Raises:
      ValueError: the file is damaged, is none of PyTorch, or holds anything else than tensors by name.
      OSError: it cannot be read.
    """
    place = pathlib.Path(path)
    if place.exists() and not place.is_file():
        raise ValueError(f"{place} is {'a folder' if place.is_dir() else 'no regular file'}")
    with place.open("rb") as opened:
        file = _File(opened)
        try:
            return _read_zip(file) if opened.peek(4)[:4] == b"PK\x03\x04" else _read_legacy(file)
        except Refused as error:
            raise ValueError(f"{place}: {one_line(str(error))}") from None
        except _FAILURES as error:
            reason = one_line(first_line(error))
            raise ValueError(f"{place} is no file of PyTorch's tensors, or it is damaged: {reason}") from None


class _File:
    """A file that allocates no more than it has, whatever number of bytes is asked for, and is never left by a seek."""

    def __init__(self, file: Any):
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        self.readline, self.tell = file.readline, file.tell
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + (0, self._file.tell(), self.size)[whence]
        if not 0 <= place <= self.size:
            raise io.UnsupportedOperation("it points outside of itself")  # an OSError to zipfile, a ValueError here
        return self._file.seek(place)

    def seekable(self) -> bool:
        return True


def _read_zip(file: _File) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:  # type: ignore[arg-type]  # all that is read of a file is there
        entries = {info.filename: info for info in archive.infolist()}
        found = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1 or len(entries) != len(archive.infolist()):
            raise Refused("it is a zip archive, but none that PyTorch wrote")
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in entries.values()):
            raise Refused("it is a compressed or encrypted zip archive, which PyTorch does not write")
        if sum(info.file_size for info in entries.values()) > file.size:
            raise Refused("it ends before its values do")
        prefix = found[0].removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise Refused("its numbers are big-endian")
        tensors = _tensors(unpickle(io.BytesIO(archive.read(found[0]))))
        storages = _storages(tensors, file.size)

        def values(storage: Storage) -> np.ndarray:
            name = f"{prefix}data/{storage.key}"
            if name not in entries or entries[name].file_size != storage.size * storage.dtype.itemsize:
                raise Refused(f"it lacks the values of its storage {shown(storage.key)}")
            return np.frombuffer(archive.read(name), storage.dtype)

        return _arrays(tensors, {storage.key: values(storage) for storage in storages})


def _read_legacy(file: _File) -> dict[str, np.ndarray]:
    if _number(file) != _MAGIC or unpickle(file) != _PROTOCOL:
        raise Refused("it is no file of PyTorch's")
    system = unpickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its numbers are big-endian")
    tensors = _tensors(unpickle(file))
    keys = unpickle(file)
    wanted = {storage.key: storage for storage in _storages(tensors, file.size)}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or not wanted.keys() <= set(keys):
        raise Refused("it does not say where its values are")
    if len(set(keys)) < len(keys):
        raise Refused("it has the values of a storage twice")
    found: dict[str, np.ndarray] = {}
    for key in keys:
        if key not in wanted:
            raise Refused(f"it has a storage {shown(key)} that no tensor has")
        dtype, size = wanted[key].dtype, wanted[key].size
        (stored,) = struct.unpack("<q", file.read(8))
        if stored != size:
            raise Refused(f"it lacks the values of its storage {shown(key)}")
        values = file.read(size * dtype.itemsize)
        if len(values) != size * dtype.itemsize:
            raise Refused("it ends before its values do")
        found[key] = np.frombuffer(values, dtype)
    return _arrays(tensors, found)


def _number(file: _File) -> Any:
    """What the first pickle of the older format holds, which is also where a file of another kind begins."""
    try:
        return unpickle(file)
    except (Refused, *_FAILURES):
        return None


def _tensors(loaded: Any) -> dict[str, Tensor]:
    """What was unpickled, if it is tensors by name."""
    if isinstance(loaded, dict):
        inner = next((loaded[name] for name in _NESTED if isinstance(loaded.get(name), dict)), None)
        loaded = loaded if inner is None else inner
    if not isinstance(loaded, dict) or not loaded:
        raise Refused("it holds no dict of tensors; save the model's state_dict()")
    others = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise Refused(f"{shown(others[0])}{more} is no tensor; save the model's state_dict() alone")
    return loaded


def _storages(tensors: Mapping[str, Tensor], limit: int) -> Iterable[Storage]:
    """The storages of the tensors, which are known to be in a file of `limit` bytes, as are the tensors' own elements."""
    storages: dict[str, Storage] = {}
    for tensor in tensors.values():
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise Refused(f"its storage {shown(tensor.storage.key)} is described in two ways")
    if sum(storage.size * storage.dtype.itemsize for storage in storages.values()) > limit:
        raise Refused("it ends before its values do")
    for name, tensor in tensors.items():
        last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        if math.prod(tensor.shape) and last >= tensor.storage.size:
            raise Refused(f"{shown(name)} reaches outside of its storage")
    made = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in set(tensors.values()))
    if made > limit + _REPEATED:
        raise Refused("its tensors repeat their elements too often; save them contiguous")
    return storages.values()


def _arrays(tensors: Mapping[str, Tensor], storages: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors that are the same are one array, which cannot be written."""
    known = {tensor: _copied(tensor, storages[tensor.storage.key]) for tensor in dict.fromkeys(tensors.values())}
    return {name: known[tensor] for name, tensor in tensors.items()}


def _copied(tensor: Tensor, flat: np.ndarray) -> np.ndarray:
    """A tensor's elements in order."""
    if len(flat) != tensor.storage.size:
        raise Refused(f"it lacks the values of its storage {shown(tensor.storage.key)}")
    if not math.prod(tensor.shape):
        array = np.zeros(tensor.shape, flat.dtype)
    else:
        steps = tuple(
            stride * flat.itemsize if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        array = np.array(
            np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False), order="C"
        )
    array.flags.writeable = False
    return array
