"""Data sets and the order in which training and evaluation read them."""
