"""bertjax compiled ahead of time for an H200, on a machine without a GPU: what its kernels move through memory.

    python -m benchmarks.gpu [--size NAME ...] [--shape BxL ...] [--program NAME ...] [--save NAME]

It needs `pip install '.[cuda]'`, for XLA's compiler, and no GPU. Nothing is timed: bytes are COUNTED in the compiled
program, each array that a kernel reads or writes once, and operations come from the formula. From the two follows a
BOUND: matrix products at the nominal peak, and before or after them all that the other kernels move, at the nominal
bandwidth. No GPU of that kind is faster, and a real one is slower.

Everything is in bfloat16. Products are cuBLAS', since without a GPU nothing can be tried out. Six programs are
compared: padded batches, packed ones, and a training step (masked language modelling with AdamW, packed, parameters in
float32, layers unrolled, no dropout), with attention by plain XLA and by cuDNN.
"""

import functools
import itertools
import math
import os
import re
import sys
import time
from typing import Any

import click

from benchmarks import timing
from benchmarks.hlo import Instruction, Program
from benchmarks.tpu import SIZES, bertjax_program
from benchmarks.tpu_train import lower_step
from benchmarks.workloads import MASKED, NOMINAL_TFLOPS, Sizes, parse_shape

#: What XLA has to know of an H200 SXM (NVIDIA's data sheet; CUDA C++ Programming Guide, compute capability 9.0).
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
BANDWIDTH = 4.8e12
SHAPES = {"minilm": ("256x128",), "base": ("8x128", "32x128", "128x128", "32x512"), "large": ("32x384",)}
_NAMES = ("padded", "packed", "training")
PROGRAMS = tuple(itertools.product(_NAMES, ("xla", "cudnn")))
# What runs no kernel.
_FREE = frozenset("parameter tuple get-tuple-element bitcast constant while call after-all opt-barrier".split())


def prepare_environment() -> None:
    """Tells JAX, before it is imported, that there is no GPU, and XLA that it can't try out kernels on one."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


@functools.cache
def device() -> Any:
    """A device that programs can be compiled for."""
    import jax
    from jax.experimental import topologies

    jax.default_backend = lambda: "gpu"  # what bertjax asks whether there may be cuDNN
    options = {"topology": "1x1x1", "target_config": TARGET}
    try:
        return topologies.get_topology_desc(platform="cuda", topology_name="H200", **options).devices[0]
    except NotImplementedError:
        raise click.ClickException("needs XLA's compiler for GPUs: pip install '.[cuda]'") from None


def is_product(kernel: Instruction) -> bool:
    """Whether a kernel is a matrix product."""
    return "__cublas" in kernel.line


def lowered(size: str, shape: str, program: str, attention: str) -> Any:
    """A program, lowered for an H200."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    if program == "training":
        return lower_step([device()], size, shape, "replicated", dropout=0.0, attention=attention, unroll=True)
    sharding, ids = SingleDeviceSharding(device()), jax.ShapeDtypeStruct(parse_shape(shape), jnp.int32)
    apply, params = bertjax_program(size, packed=program == "packed", attention=attention)
    return jax.jit(apply, in_shardings=sharding, out_shardings=sharding).lower(params, ids, ids)


def operations(size: str, shape: str, program: str) -> int:
    """Operations of a program by the formula; see `Sizes`."""
    layers, hidden, _, intermediate = SIZES[size]
    sizes, (rows, length) = Sizes(layers, hidden, intermediate, 30522), parse_shape(shape)
    if program == "training":
        return sizes.training_flops(rows, length, int(MASKED * rows * length))
    return sizes.encoder_flops([length] * rows)


def compile_case(size: str, shape: str, program: str, attention: str) -> dict[str, Any]:
    """Compiles one program; returns what is counted in it."""
    begin = time.perf_counter()
    compiled = lowered(size, shape, program, attention).compile()
    seconds = time.perf_counter() - begin
    text = Program(compiled.as_text())
    kernels = [(times, each) for times, each in text.scheduled() if each.opcode not in _FREE]
    moved = sum(times * text.traffic(each) for times, each in kernels if not is_product(each))
    least = operations(size, shape, program) / (NOMINAL_TFLOPS["H200"] * 1e12)
    return {
        "size": size,
        "shape": shape,
        "program": program,
        "attention": attention,
        "kernels": sum(times for times, _ in kernels),
        "products": sum(times for times, each in kernels if is_product(each)),
        "float32_products": sum(times for times, each in kernels if is_product(each) and _writes_float32(each)),
        "moved_per_position_and_layer": moved / (math.prod(parse_shape(shape)) * SIZES[size][0]),
        "bound_of_peak": least / (least + moved / BANDWIDTH),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def _writes_float32(kernel: Instruction) -> bool:
    return re.search(r"\bf32\[", kernel.type) is not None


def report(found: dict[str, Any]) -> str:
    """What was counted, for a person to read."""
    head = "size, shape, program, attention, kernels, products, with float32 results, kB moved by others, bound"
    rows = [[*head.split(", "), "temporary MB", "compiled in s"]]
    for each in found["cases"]:
        rows.append(
            [
                *(each[name] for name in ("size", "shape", "program", "attention")),
                *(str(each[name]) for name in ("kernels", "products", "float32_products")),
                f"{each['moved_per_position_and_layer'] / 1e3:.1f}",
                f"{each['bound_of_peak']:.2f}",
                f"{each['temporary_bytes'] / 1e6:.0f}",
                f"{each['compile_seconds']:.1f}",
            ]
        )
    return "\n".join(
        [
            "# bertjax compiled ahead of time for an H200: counted, not measured",
            "",
            timing.describe_machine(found["machine"]),
            "",
            f"`{found['command']}`",
            "",
            "Nothing here ran on a GPU. kB are those that all kernels but the matrix products read and write, per",
            "position and layer. The bound is the share of the nominal peak (989 TFLOP/s) that is left if products",
            "take no longer than at that peak, and the others no longer than their bytes at the nominal bandwidth",
            "(4.8 TB/s).",
            "",
            timing.table(rows),
        ]
    )


@click.command()
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(SIZES)), default=list(SIZES))
@click.option("--shape", "shapes", multiple=True, help="Rows x length; default: those of each size in SHAPES.")
@click.option("--program", "programs", multiple=True, type=click.Choice(_NAMES), default=_NAMES)
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def main(sizes, shapes, programs, name: str | None) -> None:
    """Compiles for an H200 and prints what its kernels move."""
    prepare_environment()
    cases = []
    for size in sizes:
        for shape in shapes or SHAPES[size]:
            cases += [compile_case(size, shape, *each) for each in PROGRAMS if each[0] in programs]
    found = {
        "machine": timing.machine(),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "label": "counted in the compiled program",
        "cases": cases,
    }
    click.echo(report(found))
    if name:
        click.echo(f"written to {timing.save(name, report(found), found)}", err=True)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")
