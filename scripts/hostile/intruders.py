"""Data that would become code, markup or a file elsewhere."""

from scripts.hostile.harness import Kind

KIND = Kind("intruders")
