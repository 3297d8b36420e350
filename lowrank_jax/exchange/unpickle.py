"""Pickles of PyTorch's tensors as descriptions of them, without running what the pickles say.

A pickle is a program for a machine with a stack, and Python's own machine calls what the program names.  The machine here has
the instructions that a dict of tensors needs, makes numbers, texts, lists, tuples, dicts with texts as keys, and the two
descriptions below, and calls nothing.  What it makes is about as large as the pickle.
"""

import pickletools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowrank_jax.text import shown

DTYPES: Mapping[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16.dtype,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
"""PyTorch's storages, and NumPy's names of what is in them."""

_DEEPEST = 64  # axes of a tensor
_ADVICE = "only tensors are read, as no code of a file is run here; save the model's state_dict() alone"


class Refused(Exception):
    """The file holds what is not read."""


class Storage(NamedTuple):
    """A piece of a file: what its elements are, what it is called, and how many it is said to have."""

    dtype: np.dtype[Any]
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(NamedTuple):
    """A name that stands for something of Python's."""

    module: str
    name: str


class _Mark:
    """Where the arguments of an instruction begin."""


_MARK = _Mark()
_DICT = _Global("collections", "OrderedDict")
_TENSORS = (_Global("torch._utils", "_rebuild_tensor_v2"), _Global("torch._utils", "_rebuild_tensor"))
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")


def unpickle(file: Any) -> Any:
    """What a pickle holds; afterwards the file is behind it.

    Args:
      file: with `read`, `readline` and `tell`; its `read` makes nothing larger than what the file holds.

    Raises:
      Refused: it has an instruction or a name that no dict of tensors needs.
      Exception: it is damaged: one of ValueError, IndexError, KeyError, TypeError and AttributeError.
    """
    machine = _Machine()
    with warnings.catch_warnings(action="ignore"):  # of backslashes in names
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    raise ValueError("it has no end")


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._copied = 0

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError(f"it holds {len(self._stack)} values, not one")
        return self._pop()

    def step(self, name: str, argument: Any) -> None:
        self._steps += 1
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _MADE:
            self._stack.append(_MADE[name]())
        elif name in _PUTS:
            self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
        elif name in _GETS:
            self._stack.append(self._memo[argument])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"it has the instruction {name}, and {_ADVICE}")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("it takes what is not there")
        return value

    def _marked(self) -> list[Any]:
        """Takes what is above the last mark."""
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _text(self, argument: str) -> None:
        self._stack.append(argument.encode("latin-1").decode())  # of Python 2, whose texts were bytes

    def _global(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def _stack_global(self, argument: None) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        found = _Global(module, name)
        storage = module in ("torch", "torch.storage") and name in DTYPES
        if not storage and found not in (_DICT, *_TENSORS, _PARAMETER):
            raise Refused(f"it holds {shown(f'{module}.{name}')}, and {_ADVICE}")
        self._stack.append(found)

    def _tuple(self, argument: None) -> None:
        self._stack.append(tuple(self._marked()))

    def _tuple_of(self, count: int) -> None:
        self._stack.append(tuple([self._pop() for _ in range(count)][::-1]))

    def _append(self, argument: None) -> None:
        value = self._pop()
        self._extend([value])

    def _appends(self, argument: None) -> None:
        self._extend(self._marked())

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        self._stack[-1].extend(values)

    def _set_item(self, argument: None) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _set_items(self, argument: None) -> None:
        self._update(self._marked())

    def _update(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict:
            raise ValueError("it sets an item of what is no dict")
        keys, values = items[::2], items[1::2]
        _check_keys(keys)
        self._stack[-1].update(zip(keys, values, strict=True))

    def _build(self, argument: None) -> None:
        """Attributes of a dict, such as the versions of a model's layers, are not needed."""
        self._pop()
        if type(self._stack[-1]) is not dict:
            raise Refused(f"it sets attributes, and {_ADVICE}")

    def _persistent(self, argument: None) -> None:
        self._stack.append(_storage(self._pop()))

    def _reduce(self, argument: None) -> None:
        arguments, function = self._pop(), self._pop()
        if type(arguments) is not tuple or type(function) is not _Global:
            raise ValueError("it calls what is nothing to call")
        makes = {_DICT: self._dict, _PARAMETER: _parameter, **dict.fromkeys(_TENSORS, _tensor)}
        if function not in makes:
            raise Refused(f"it calls {function.module}.{function.name}, and {_ADVICE}")
        try:
            self._stack.append(makes[function](*arguments))
        except TypeError:
            raise ValueError(f"it calls {function.module}.{function.name} with other arguments") from None

    def _dict(self, pairs: Any = ()) -> dict[str, Any]:
        """Python 2 wrote a list of lists of two."""
        self._copied += len(pairs)
        if self._copied > self._steps:
            raise Refused("it repeats itself")
        if type(pairs) not in (list, tuple) or any(type(pair) not in (list, tuple) for pair in pairs):
            raise ValueError("it makes a dict of what has no items")
        items = [(key, value) for key, value in pairs]
        _check_keys([key for key, _ in items])
        return dict(items)


_VALUES = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
)
_MADE: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": lambda: _MARK,
}
_PUTS, _GETS = frozenset(("BINPUT", "LONG_BINPUT", "MEMOIZE")), frozenset(("BINGET", "LONG_BINGET"))
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "SHORT_BINSTRING": _Machine._text,
    "BINSTRING": _Machine._text,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
    "REDUCE": _Machine._reduce,
}


def _check_keys(keys: list[Any]) -> None:
    """Texts alone: the hash of a tuple of tuples may take for ever."""
    others = [key for key in keys if type(key) is not str]
    if others:
        raise Refused(f"it has a dict with {type(others[0]).__name__} among its keys, and {_ADVICE}")


def _storage(described: Any) -> Storage:
    """Of ("storage", type, key, location, size), and in the older format one more."""
    if type(described) is not tuple or len(described) not in (5, 6) or described[0] != "storage":
        raise Refused("it refers to something that is no tensor's storage")
    _, kind, key, _, size, *view = described
    if type(kind) is not _Global or kind.name not in DTYPES:
        raise Refused("it refers to something that is no tensor's storage")
    if type(key) is not str or not _is_size(size) or any(part is not None for part in view):
        raise Refused("it has a storage without a size")
    return Storage(np.dtype(DTYPES[kind.name]), key, size)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> Tensor:
    del others  # whether it had a gradient, and hooks
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise Refused("it has a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > _DEEPEST or not all(map(_is_size, numbers)):
        raise Refused("it has a tensor without a shape")
    return Tensor(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    """Whether it is a number that the format can hold: products of larger ones may take for ever."""
    return type(value) is int and 0 <= value < 2**63


def _parameter(data: Any, *others: Any) -> Tensor:
    del others
    if type(data) is not Tensor:
        raise Refused("it has a parameter without a tensor")
    return data
