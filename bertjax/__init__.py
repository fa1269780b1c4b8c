"""BERT on JAX and Flax NNX."""
