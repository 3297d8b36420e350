"""The files of a run: identity, checkpoints, metrics."""
