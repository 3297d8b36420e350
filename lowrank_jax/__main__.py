"""`python -m lowrank_jax` is `lowrank`."""

from lowrank_jax.experiment.cli.commands import main

if __name__ == "__main__":
    main()
