"""What trials and settings are called."""

import hashlib
import re
from collections.abc import Sequence


def folder_names(assignments: Sequence[dict[str, str]]) -> list[str]:
    """A folder name for each, for example `method=spectral,scale=0.1,seed=0`."""
    keys = dict.fromkeys(key for assignment in assignments for key in assignment)
    last = [short(key) for key in keys]
    named = {key: tail if last.count(tail) == 1 else key for key, tail in zip(keys, last, strict=True)}
    names = []
    for assignment in assignments:
        exact = ",".join(f"{named[key]}={text}" for key, text in assignment.items())
        name = re.sub(r"[^\w.,=+-]+", "_", exact)
        if name != exact or len(name) > 150:  # names may have become equal
            name = f"{name[:150]}-{hashlib.sha256(exact.encode()).hexdigest()[:6]}"
        names.append(name)
    return names


def short(key: str) -> str:
    """What a setting is called where that is no other's: its last part, and of a budget that it is one, as in budget.params."""
    return key.removeprefix("lowrank.") if key.startswith("lowrank.budget.") else key.rpartition(".")[2]
