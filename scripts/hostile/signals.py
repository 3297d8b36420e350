"""Ctrl-C and SIGTERM at any moment of any command."""

from scripts.hostile.harness import Kind

KIND = Kind("signals")
