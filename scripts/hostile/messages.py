"""Bad input, and the one message and status that it deserves."""

from scripts.hostile.harness import Kind

KIND = Kind("messages")
