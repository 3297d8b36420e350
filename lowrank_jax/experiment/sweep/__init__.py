"""Sweeps: many ordinary runs, each `lowrank train` with overrides in a work directory of its own."""
