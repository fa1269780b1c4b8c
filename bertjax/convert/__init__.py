"""Weights in and out: the mapping as data, an exact ledger, and the files. Imports neither jax nor a model."""
