"""Values that can be hashed, so that whatever holds them can be a key of a cache."""

from collections.abc import Mapping
from typing import Any, NoReturn


class FrozenDict(dict):
    """A dict that cannot change and can be hashed; it equals a dict of the same items, and prints and serialises like one."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:  # a dict is pickled and copied by setting its items
        return FrozenDict, (dict(self),)

    def _refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a FrozenDict cannot change")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def thaw(value: Any) -> Any:
    """`FrozenDict`s as plain dicts, all the way down, for those who may change them."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return tuple(map(thaw, value)) if isinstance(value, tuple) else value


def freeze(value: Any) -> Any:
    """Mappings as `FrozenDict` and lists as tuples, all the way down."""
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value
