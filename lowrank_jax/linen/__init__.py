"""The door to flax.linen: which kernels a module has, and how its layers run on factors."""
