"""Weights and programs of other frameworks, in and out."""
