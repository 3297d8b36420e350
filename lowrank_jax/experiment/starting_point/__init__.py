"""`lowrank new`: a config, a model, data and a README that train as they are, for the user to change."""
