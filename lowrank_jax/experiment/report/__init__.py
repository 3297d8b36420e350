"""Reports: finished runs compared on one page, and initialisations compared before training."""
