"""One strict reading of a config file and its overrides."""
