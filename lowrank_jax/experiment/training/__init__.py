"""Training, from the experiment that a config describes to the loop."""
