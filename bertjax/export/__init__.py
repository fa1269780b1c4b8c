"""A whole encoder as a program that needs JAX and neither Flax nor bertjax: `jax.export`, StableHLO.

What is written is a folder: the program, from token ids to vectors, its weights, the tokenizer, a config.json and
`load.py`, which runs them. The program takes the weights as arguments, because a constant would be there once more for
every shape that is compiled, and batch and length are symbolic, so that there is one program for all of them.
"""

from bertjax.export.folder import export_encoder, export_folder, write_export

__all__ = ["export_encoder", "export_folder", "write_export"]
