"""The compiled library: whether it is there, what this CPU has of what it needs, and making XLA know it."""

import ctypes
import functools
import logging
import platform
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

#: What the encoder is called in a compiled program.
TARGET = "bertjax_encoder"
LIBRARY = Path(__file__).with_name("libencoder.so")

# By compute dtype, the instructions, as Linux spells them in /proc/cpuinfo.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "bmi2", "abm", "popcnt")
_AMX = (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16")
_INSTRUCTIONS = {"float32": _AVX512, "bfloat16": _AMX, "int8": (*_AMX, "amx_int8")}


def available(dtype: jax.typing.DTypeLike) -> bool:
    """Whether encoders that compute in this dtype can run natively on this machine. Starts no JAX backend."""
    return library_problem(jax.numpy.dtype(dtype).name) is None


@functools.cache
def library_problem(dtype: str) -> str | None:
    """What keeps the library from computing in this dtype on this machine, or None."""
    if dtype not in _INSTRUCTIONS:
        return f"it computes in {', '.join(_INSTRUCTIONS)}, not in {dtype}"
    if missing := missing_instructions(dtype):
        return f"in {dtype} it needs a CPU with {', '.join(missing)}"
    library = _load()
    if isinstance(library, str):
        return library
    # Linux lets a process use AMX's tiles only after it has asked.
    if "amx_tile" in _INSTRUCTIONS[dtype] and library.bertjax_enable_amx() != 0:
        return "the operating system does not let this process use AMX"
    return None


def missing_instructions(dtype: str) -> list[str]:
    """What this CPU would need besides what it has, to compute in a dtype of `_INSTRUCTIONS`."""
    return [name for name in _INSTRUCTIONS[dtype] if name not in _cpu_flags()]


@functools.cache
def _cpu_flags() -> frozenset[str]:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, which XLA knows from then on, or why there is none."""
    if not LIBRARY.exists():
        return "bertjax was installed without it, for want of a C++ compiler"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.bertjax_encoder), platform="cpu")
    except Exception as error:
        # jaxlib says in many types of error that a library was compiled for another version of it; XLA's own way of
        # computing the same remains.
        logger.warning(
            "%s can't be used, XLA alone is; reinstall bertjax with --no-build-isolation: %s", LIBRARY, error
        )
        return f"{LIBRARY} can't be loaded: {error}"
    return library
