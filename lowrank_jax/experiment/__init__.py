"""The experiment half: config files, data, training, evaluation, sweeps and reports."""
