"""What a run needs of a TPU slice, as estimated by the TPU's own compiler."""
