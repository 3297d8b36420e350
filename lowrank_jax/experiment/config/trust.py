"""Which code a stored config may have imported.

A config.json names code: its model, its objective, its data set.  Whoever wrote it must not decide what runs here, so a name
that is not this project's own is imported only if the user trusts it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from lowrank_jax import models
from lowrank_jax.experiment import objective
from lowrank_jax.experiment.config.code import code_names
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.text import shown

Trust = bool | Collection[str]
"""True for every name, or the names that may be imported."""


class UntrustedCode(UserError):
    """A stored config names code that nobody has trusted; nothing was imported.

    Attributes:
      names: that code, as "package.module:attribute".
    """

    def __init__(self, source: str, named: Mapping[str, list[str]], folder: Any = None):
        self.names = tuple(dict.fromkeys(name for names in named.values() for name in names))
        listed = ", ".join(f"{key} {name!r}" for key, names in named.items() for name in names)
        place = f" (looked up in {shown(folder)} too)" if folder is not None else ""
        super().__init__(
            f"{source} names code that is not lowrank_jax's own: {listed}{place}. Nothing was imported."
            " Whoever wrote that code can do whatever you can; read it before you trust it."
        )


def check_trust(values: Mapping[str, Any], trusted: Trust, source: str, unused: Collection[str] = ()) -> None:
    """Checks the names in a stored config before anything imports them.

    Args:
      values: as in config.json; they need not be valid.
      trusted: what the user trusts.
      source: what to call the config in messages.
      unused: the keys whose code will not be imported, whatever it is.

    Raises:
      UntrustedCode: a name is neither trusted nor the project's own.
    """
    if trusted is True:
        return
    allowed = own_names() | set(trusted or ())
    named = {key: [name for name in names if name not in allowed] for key, names in code_names(values).items()}
    named = {key: names for key, names in named.items() if key not in unused}
    if untrusted := {key: names for key, names in named.items() if names}:
        raise UntrustedCode(source, untrusted, values.get("code_dir"))


def own_names() -> set[str]:
    """The models, losses and metrics of this project as importable names; nothing else of it may be called."""
    classes = {getattr(made, "func", made) for made in models.MODELS.values()}
    functions = {*objective.LOSSES.values(), *objective.METRICS.values()}
    names = {f"{models.__name__}:{cls.__name__}" for cls in classes}
    return names | {f"{made.__module__}:{made.__qualname__}" for made in classes | functions}
