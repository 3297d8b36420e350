"""`lowrank`, and `python -m lowrank_jax`."""

from typing import NoReturn

from lowrank_jax.experiment import interrupts, streams


def main() -> NoReturn:
    """Runs a command and exits with its status."""
    streams.keep_open()
    interrupts.obey()  # before anything else is imported, which takes seconds
    from lowrank_jax.experiment.cli import commands

    commands.main()


if __name__ == "__main__":
    main()
