"""The door to flax.linen: which kernels a module has, and how its layers run on factors."""

from lowrank_jax.linen import serialization as serialization  # registers factor pairs
