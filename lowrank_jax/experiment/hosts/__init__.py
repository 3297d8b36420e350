"""Several devices and several hosts: meshes, processes and what they agree on."""
