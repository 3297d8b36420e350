"""`lowrank configs`: the configs that come with the package."""

import pathlib
import shlex

from lowrank_jax.experiment import shipped
from lowrank_jax.experiment.cli.output import say
from lowrank_jax.experiment.errors import DONE, UserError
from lowrank_jax.text import align, did_you_mean


def list_all() -> int:
    """Prints a line for each."""
    say(align([[name, shipped.summary(name)] for name in shipped.names()]))
    return DONE


def copy(name: str, directory: str) -> int:
    """Writes one into a folder, to be changed.

    Raises:
      UserError: there is no config of this name, no such folder, or a file of that name in it.
    """
    if name not in shipped.names():
        raise UserError(f"lowrank configs copy: there is no config {name!r}{did_you_mean(name, shipped.names())}")
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; lowrank configs copy writes {name}.py into one that is there")
    target, text = folder / f"{name}.py", shipped.path(name).read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{target} is there already, and is not written over; name another folder") from None
    say(f"{target}\nlowrank train --config={shlex.quote(str(target))} --workdir=runs/{name}")
    return DONE
