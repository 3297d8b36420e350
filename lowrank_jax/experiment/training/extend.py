"""A run that is to train for longer than it was meant to.

Its config says so: `extensions` has the lengths that it had before, so that the steps until then stay what they were, and
whatever reads the work directory knows.
"""

import dataclasses

from lowrank_jax.experiment.config.files import ConfigError, to_dict
from lowrank_jax.experiment.config.parse import parse
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.workdir.identity import differences
from lowrank_jax.experiment.workdir.workdir import Workdir

_LENGTH = ("steps", "epochs", "extensions")


def extended(config: Config, workdir: str, schedule: str | None = None, source: str = "config") -> Config:
    """The config of the run in a work directory, made as long as another one; of one that is so long already, its own.

    Args:
      config: the run's, but for `steps` and `epochs`.
      workdir: of the run, which need not have finished: its own steps come first.
      schedule: how the learning rate goes on: `restart`, the schedule anew over what is added, which None means too; or
        `constant`, at the rate of the last step.
      source: what to call the config in messages.

    Raises:
      WorkdirError: there is no run, or one of another experiment.
      ConfigError: the run is longer, or was extended in another way, or the config does not fit the new length.
    """
    folder = Workdir(workdir)
    folder.check_bucket()
    if not (folder.path / "config.json").exists():
        raise WorkdirError(f"{workdir}: there is no run to extend; train one without --extend")
    if config.extensions:
        raise ConfigError(source, ["extensions: set, and --extend sets it; remove one of them"])
    found = folder.read_config()
    lengths = {key: found[key] for key in _LENGTH}
    if differing := differences(found, {**to_dict(config), **lengths}):
        raise WorkdirError(f"{workdir} belongs to another experiment: {'; '.join(differing)}. Only its length can be extended.")
    run = parse({**to_dict(config), **lengths}, source=f"{workdir}/config.json")
    if config.total_steps > run.total_steps:
        extensions = (*run.extensions, (run.length, schedule or "restart"))
        return parse(to_dict(dataclasses.replace(config, extensions=extensions)), source=source)
    if config.length != run.length:
        raise ConfigError(source, [f"--extend: {config.length}; {workdir} has {run.length} already, so give more"])
    if not run.extensions:
        raise ConfigError(source, [f"--extend: {workdir} has {run.length}; give more, by --config.epochs or --config.steps"])
    if schedule not in (None, how := run.extensions[-1][1]):
        raise ConfigError(source, [f"--schedule: {schedule}; {workdir} was extended with {how}"])
    return run
