"""Tries to break the project from outside: damaged files, hostile values, senseless settings, signals at any moment."""
