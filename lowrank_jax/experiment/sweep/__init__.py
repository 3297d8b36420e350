"""Sweeps: many ordinary runs, each one `lowrank train` with overrides in its own work directory."""
