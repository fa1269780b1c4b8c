"""The compiled library: whether it is there, what this CPU has of what it needs, and making XLA know it."""

import ctypes
import enum
import functools
import logging
import platform
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

#: What the encoder is called in a compiled program.
TARGET = "bertjax_encoder"
LIBRARY = Path(__file__).with_name("libencoder.so")

# As Linux spells them in /proc/cpuinfo.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "bmi2", "abm", "popcnt")
_AMX = (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16")


class Way(enum.IntEnum):
    """How matrices are multiplied; the numbers are those that the library knows."""

    FLOAT32 = 0
    AMX_BFLOAT16 = 1
    AVX512_BFLOAT16 = 2
    AMX_INT8 = 3
    AVX512_INT8 = 4
    #: What is in bfloat16 elsewhere, attention's own products, is in float32.
    AVX512_INT8_FLOAT32 = 5


# By compute dtype, with the instructions that each takes; the fastest first.
_WAYS = {
    "float32": {Way.FLOAT32: _AVX512},
    "bfloat16": {Way.AMX_BFLOAT16: _AMX, Way.AVX512_BFLOAT16: (*_AVX512, "avx512_bf16")},
    "int8": {
        Way.AMX_INT8: (*_AMX, "amx_int8"),
        Way.AVX512_INT8: (*_AVX512, "avx512_bf16", "avx512_vnni"),
        Way.AVX512_INT8_FLOAT32: (*_AVX512, "avx512_vnni"),
    },
}


def available(dtype: jax.typing.DTypeLike) -> bool:
    """Whether encoders that compute in this dtype can run natively on this machine. Starts no JAX backend."""
    return library_problem(jax.numpy.dtype(dtype).name) is None


@functools.cache
def library_problem(dtype: str) -> str | None:
    """What keeps the library from computing in this dtype on this machine, or None."""
    if dtype not in _WAYS:
        return f"it computes in {', '.join(_WAYS)}, not in {dtype}"
    if not possible_ways(dtype):
        # The last takes the least.
        missing = [name for name in list(_WAYS[dtype].values())[-1] if name not in _cpu_flags()]
        return f"in {dtype} it needs a CPU with {', '.join(missing)}"
    library = _load()
    if isinstance(library, str):
        return library
    return None if ways(dtype) else "the operating system does not let this process use AMX"


def possible_ways(dtype: str) -> list[Way]:
    """The ways to compute in a dtype that this CPU has the instructions for, the fastest first."""
    return [way for way, needed in _WAYS[dtype].items() if _cpu_flags().issuperset(needed)]


def ways(dtype: str) -> list[Way]:
    """Those of them that the operating system allows, too, where the library is there; the first is taken."""
    return [way for way in possible_ways(dtype) if "amx_tile" not in _WAYS[dtype][way] or _amx_allowed()]


@functools.cache
def _amx_allowed() -> bool:
    # Linux lets a process use AMX's tiles only after it has asked.
    library = _load()
    return not isinstance(library, str) and library.bertjax_enable_amx() == 0


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
