"""Reports: what finished runs say, and what initialisations do before training, on one page."""
