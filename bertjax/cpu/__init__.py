"""The whole encoder as one native call, for CPUs with AVX-512, and in bfloat16 and int8 with its extensions or AMX.

XLA's own matrix products reach about half of what such a CPU can do, so `encoder.cc` has all layers as one custom call,
which XLA runs in the middle of an ordinary program, on its own threads. It is compiled when bertjax is installed, where
there is a C++ compiler; `available` says whether it is there. `BertModel` takes it by itself where it applies (see
`problem`); a model with attention="xla" never does.

An inference program on one CPU device has the call. Everything else has the scan over layers: a program for
another platform, over several devices or in a `shard_map`, one that is exported, a derivative, and what is run outside
of `jit`. Only when a program is compiled is all of that known, so that is when `encoder_or` chooses.
"""

from bertjax.cpu.choice import encoder_or
from bertjax.cpu.encoder import encode, is_plain, problem
from bertjax.cpu.library import available

__all__ = ["available", "encode", "encoder_or", "is_plain", "problem"]
