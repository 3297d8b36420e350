"""Which kernels are factored, at which rank and how they run; knows jax, and no module library."""
