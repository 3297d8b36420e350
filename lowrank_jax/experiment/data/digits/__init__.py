"""Scikit-learn's handwritten digits as a TFDS dataset (TFDS wants every local builder in a package of its own)."""
