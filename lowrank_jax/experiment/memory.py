"""The memory of this machine, and errors that say that it did not suffice."""

import os
from collections.abc import Iterable

import jax

from lowrank_jax.experiment.errors import UserError
from lowrank_jax.text import count, first_line


class TooLarge(UserError):
    """Something does not fit into memory; the message has a line for each such thing."""

    def __init__(self, parts: Iterable[str]):
        super().__init__("\n".join(f"out of memory: {part}" for part in parts))


def beyond(what: str, size: float, memory: float, whose: str) -> list[str]:
    """What is too large, in words; nothing if it fits."""
    return [f"{what}: {count(int(size))}B; {whose} has {count(int(memory))}B"] if size > memory else []


def beyond_machine(what: str, size: float) -> list[str]:
    """The same for this machine."""
    return beyond(what, size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine")


def exhausted(error: BaseException) -> str | None:
    """What an error says of memory that could not be had; None if it is about something else."""
    said = isinstance(error, jax.errors.JaxRuntimeError) and any(words in str(error) for words in _EXHAUSTED)
    if not said and not isinstance(error, MemoryError):
        return None
    return f"out of memory: {first_line(error)}; lower batch_size, eval.batch_size or the size of the model"


_EXHAUSTED = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
