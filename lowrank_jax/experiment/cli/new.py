"""`lowrank new`: writes the starting point of a project."""

import argparse
import pathlib
import shlex

from lowrank_jax.experiment import starting_point
from lowrank_jax.experiment.cli.output import say
from lowrank_jax.experiment.errors import DONE, UserError
from lowrank_jax.experiment.workdir import files

_FILES = ("config.py", "model.py", "data.py", "README.md")


def new(args: argparse.Namespace) -> int:
    """Writes the files into a new folder."""
    folder = pathlib.Path(args.folder)
    source = pathlib.Path(starting_point.__file__).parent
    config = shlex.quote(str(folder / "config.py"))
    texts = {name: (source / name).read_text(encoding="utf-8") for name in _FILES}
    texts["README.md"] = texts["README.md"].replace("NAME", folder.resolve().name)
    if not folder.parent.exists():
        files.make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"{folder} is there already; lowrank new makes a folder, and writes over nothing") from None
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    say(f"{folder}: {', '.join(_FILES)}\nlowrank train --config={config} --workdir={shlex.quote(str(folder / 'runs' / 'a'))}")
    return DONE
