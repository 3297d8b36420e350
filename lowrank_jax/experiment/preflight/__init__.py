"""What a run would take of a TPU slice, as the TPU's own compiler estimates it."""
