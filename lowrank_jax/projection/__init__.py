"""One matrix becomes two factors: activations, linear algebra, subspaces and the methods."""
