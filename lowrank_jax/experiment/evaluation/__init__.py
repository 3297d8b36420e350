"""Evaluation of the checkpoints of finished and running runs."""
