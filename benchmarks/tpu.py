"""bertjax compiled ahead of time for TPUs, on a machine without one: what the compiler makes of it, and expects.

    python -m benchmarks.tpu [--chip NAME ...] [--size NAME ...] [--shape BxL ...] [--program NAME ...] [--save NAME]

It needs libtpu, the compiler, of the version that `jax[tpu]` asks for; see `library`. Every figure is the COMPILER'S
ESTIMATE, never a measurement: the sum of the cycles that it wrote beside each instruction (see `benchmarks.hlo`), which
leaves out waiting for memory. Everything is in bfloat16, parameters too. Four programs are compared:

- "padded": a batch of rows with an attention mask;
- "packed": the same shape with segment ids, several texts to a row;
- "kernel": packed, with the attention in bertjax's own kernel, whose cycles the compiler does not estimate: what the
  other two take more is what the kernel may take;
- "port": BERT written line by line in bfloat16, layer after layer, as a reading of the paper gives it. It is the
  baseline, and compiles for minutes. On some shapes the compiler recognises its softmax and puts in a kernel of its
  own, which it does not estimate either: the port then takes more cycles than are counted.

Real tokens are those of texts: of padded rows `FILL`, of packed rows what `bertjax.packing` reaches on such texts.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import timing
from benchmarks.hlo import Program
from benchmarks.workloads import Sizes, parse_shape

#: The share of a padded batch that is real tokens, in the comparison of padded with packed rows.
FILL = 0.4


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX calls one device of a TPU generation, from Google's "TPU architecture" and per-version pages.

    Attributes:
        topology: the smallest slice that the compiler knows.
        flops_per_cycle: 2 x matrix units x their rows x their columns.
        teraflops: nominal bfloat16 peak; with the above it gives the clock.
        memory: HBM in bytes.
        bandwidth: of the HBM in bytes a second.
    """

    topology: str
    flops_per_cycle: int
    teraflops: float
    memory: float
    bandwidth: float

    @property
    def clock(self) -> float:
        """Cycles a second at which the nominal peak is reached."""
        return self.teraflops * 1e12 / self.flops_per_cycle


#: A v4 has two cores, which the compiler takes for two devices here; those of a v5p are one device.
CHIPS = {
    "v4": Chip("v4:2x2x1", 2 * 4 * 128**2, 275 / 2, 32e9 / 2, 1200e9 / 2),
    "v5e": Chip("v5e:2x2", 2 * 4 * 128**2, 197, 16e9, 819e9),
    "v5p": Chip("v5p:2x2x1", 2 * 8 * 128**2, 459, 95e9, 2765e9),
    "v6e": Chip("v6e:2x2", 2 * 4 * 256**2, 918, 32e9, 1640e9),
}
#: layers, hidden, heads, intermediate; the vocabulary is BERT's.
SIZES = {"minilm": (6, 384, 12, 1536), "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)}
SHAPES = {
    "minilm": ("1x128", "8x128", "32x128", "8x512"),
    "base": ("1x128", "8x128", "32x128", "8x512"),
    "large": ("1x128", "8x128", "32x128", "8x512", "8x384"),
}


def library() -> str | None:
    """Where libtpu is: TPU_LIBRARY_PATH, the installed package, or the folder `libtpu` of the environment.

    The last is for environments that also run on CPU, where JAX would find an installed libtpu and warn at every start:
    `pip install --no-deps --target .venv/libtpu libtpu==VERSION`.
    """
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        return path
    found = importlib.util.find_spec("libtpu")
    folder = Path(found.submodule_search_locations[0]) if found else Path(sys.prefix, "libtpu", "libtpu")
    return str(folder / "libtpu.so") if (folder / "libtpu.so").exists() else None


def prepare_environment() -> None:
    """Tells JAX, before it is imported, to compile for a TPU that is not there."""
    path = library()
    if path is None:
        raise click.ClickException("needs libtpu: pip install '.[tpu]', or see benchmarks.tpu.library")
    os.environ |= {
        "TPU_LIBRARY_PATH": path,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU that only one process may hold
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


@functools.cache
def device(chip: str) -> Any:
    """A device of this generation that programs can be compiled for."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices[0]


def bertjax_program(size: str, packed: bool, attention: str = "xla") -> tuple[Callable, Any]:
    """bertjax's encoder as a function of parameters, ids and mask (or segment ids), and its parameters' shapes."""
    import jax.numpy as jnp
    from flax import nnx

    from bertjax import BertConfig, BertModel, functional

    layers, hidden, heads, intermediate = SIZES[size]
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=intermediate
    )
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "add_pooling_layer": False, "attention": attention}
    apply, params = functional(nnx.eval_shape(lambda: BertModel(config, rngs=nnx.Rngs(0), **options)))
    name = "segment_ids" if packed else "attention_mask"
    return lambda params, ids, mask: apply(params, ids, **{name: mask}).last_hidden_state, params


def port_program(size: str) -> tuple[Callable, Any]:
    """BERT line by line in bfloat16, as a function like `bertjax_program`'s, and its parameters' shapes."""
    import jax
    import jax.numpy as jnp

    layers, hidden, heads, intermediate = SIZES[size]
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    dense = lambda rows, columns: (array(rows, columns), array(columns))  # noqa: E731
    norm = (array(hidden), array(hidden))
    layer = {name: dense(hidden, hidden) for name in ("query", "key", "value", "output")}
    layer |= {"up": dense(hidden, intermediate), "down": dense(intermediate, hidden), "norm1": norm, "norm2": norm}
    tables = {"words": array(30522, hidden), "positions": array(512, hidden), "types": array(2, hidden)}

    def linear(x, weights):
        return x @ weights[0] + weights[1]

    def normalise(x, weights):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-12) * weights[0] + weights[1]

    def run_layer(x, mask, p):
        split = (*x.shape[:2], heads, hidden // heads)
        q, k, v = (linear(x, p[name]).reshape(split).transpose(0, 2, 1, 3) for name in ("query", "key", "value"))
        scores = q @ k.transpose(0, 1, 3, 2) / (hidden // heads) ** 0.5
        scores = scores + (1 - mask[:, None, None, :].astype(x.dtype)) * jnp.finfo(x.dtype).min
        context = (jax.nn.softmax(scores, axis=-1) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = normalise(x + linear(context, p["output"]), p["norm1"])
        return normalise(x + linear(jax.nn.gelu(linear(x, p["up"]), approximate=False), p["down"]), p["norm2"])

    def apply(params, ids, mask):
        x = params["words"][ids] + params["positions"][jnp.arange(ids.shape[1])] + params["types"][0]
        x = normalise(x, params["norm"])
        for p in params["layers"]:
            x = run_layer(x, mask, p)
        return x

    return apply, tables | {"norm": norm, "layers": [layer] * layers}


PROGRAMS: dict[str, Callable[[str], tuple[Callable, Any]]] = {
    "padded": functools.partial(bertjax_program, packed=False),
    "packed": functools.partial(bertjax_program, packed=True),
    "kernel": functools.partial(bertjax_program, packed=True, attention="tpu"),
    "port": port_program,
}


@functools.cache
def packed_fill(length: int, rows: int) -> float:
    """The share of real tokens in full packed batches of this shape, of texts that would fill `FILL` of padded rows.

    Their lengths are drawn evenly from 2 tokens to what gives that mean.
    """
    from bertjax.packing import Shapes, pack

    lengths = np.random.default_rng(0).integers(2, round(2 * FILL * length) - 1, 4000)
    texts = [np.ones(count, np.int32) for count in lengths]
    batches = [batch.segment_ids for batch in pack(texts, texts, Shapes(length, rows * length))]
    # Of longer rows, those of short texts are packed by themselves.
    full = [ids for ids in batches if ids.shape == (rows, length)]
    return float(np.mean([(ids != 0).mean() for ids in full]))


def compile_case(chip: str, size: str, shape: str, program: str) -> dict[str, Any]:
    """Compiles one program for one chip; returns what the compiler says of it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    found, (rows, length) = CHIPS[chip], parse_shape(shape)
    apply, params = PROGRAMS[program](size)
    sharding, ids = SingleDeviceSharding(device(chip)), jax.ShapeDtypeStruct((rows, length), jnp.int32)
    begin = time.perf_counter()
    lowered = jax.jit(apply, in_shardings=sharding, out_shardings=sharding).lower(params, ids, ids)
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    text, memory = Program(compiled.as_text()), compiled.memory_analysis()
    layers, hidden, _, intermediate = SIZES[size]
    flops = Sizes(layers, hidden, intermediate, 30522).encoder_flops([length] * rows)
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    cycles, fill = text.cycles(), packed_fill(length, rows) if program in ("packed", "kernel") else FILL
    return {
        "chip": chip,
        "size": size,
        "shape": shape,
        "program": program,
        "cycles": cycles,
        "cycles_per_position": cycles / (rows * length),
        "cycles_per_real_token": cycles / (rows * length * fill),
        "share_of_peak": flops / found.flops_per_cycle / cycles,
        "prefetch_cycles": round(text.prefetched_bytes() / found.bandwidth * found.clock),
        "kernels_not_estimated": text.kernels(),
        "copies": text.moves("copy"),
        "transposes": text.moves("transpose"),
        "matmuls": len(text.matmuls()),
        "float32_matmuls": sum("f32" in dtypes for dtypes in text.matmuls()),
        "memory_bytes": used,
        "fits": used <= found.memory,
        "compile_seconds": seconds,
    }


def comparisons(cases: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], float]]:
    """What was compared, where, and by what factor: cycles of the second over those of the first, per token."""
    by_key = {(each["chip"], each["size"], each["shape"], each["program"]): each for each in cases}
    for each in cases:
        here = (each["chip"], each["size"], each["shape"])
        if each["program"] != "padded":
            continue
        if port := by_key.get((*here, "port")):
            bound = ", a lower bound" if port["kernels_not_estimated"] else ""
            yield f"cycles of the port / padded{bound}", each, port["cycles"] / each["cycles"]
            kernel = by_key.get((*here, "kernel"))
            if kernel and kernel["kernels_not_estimated"] == port["kernels_not_estimated"]:
                what = "cycles of the port / kernel, of all but the attention, for which both have kernels"
                yield what, each, port["cycles"] / kernel["cycles"]
        if packed := by_key.get((*here, "packed")):
            ratio = packed["cycles_per_real_token"] / each["cycles_per_real_token"]
            yield "packed / padded, cycles per real token", each, ratio


def report(found: dict[str, Any]) -> str:
    """What the compiler estimates, for a person to read."""
    head = (
        "chip, size, shape, program, M cycles, of peak, prefetch M cycles, copies, transposes, float32 matmuls".split(
            ", "
        )
    )
    rows = [[*head, "memory GB", "fits", "compiled in s"]]
    for each in found["cases"]:
        kernels, below = ("+", "<") if each["kernels_not_estimated"] else ("", "")
        rows.append(
            [
                *(each[name] for name in ("chip", "size", "shape", "program")),
                f"{each['cycles'] / 1e6:.2f}{kernels}",
                f"{below}{each['share_of_peak']:.2f}",
                f"{each['prefetch_cycles'] / 1e6:.2f}",
                *(str(each[name]) for name in ("copies", "transposes", "float32_matmuls")),
                f"{each['memory_bytes'] / 1e9:.2f}",
                "yes" if each["fits"] else "NO",
                f"{each['compile_seconds']:.0f}",
            ]
        )
    ratios = [["chip", "size", "shape", "compiler estimate", "factor"]]
    ratios += [
        [*(c[key] for key in ("chip", "size", "shape")), what, f"{x:.2f}"] for what, c, x in found["comparisons"]
    ]
    return "\n".join(
        [
            "# bertjax compiled ahead of time for TPUs: compiler estimates",
            "",
            timing.describe_machine(found["machine"]),
            f"libtpu {found['libtpu']}",
            "",
            f"`{found['command']}`",
            "",
            "Nothing here ran on a TPU. Cycles are the compiler's own estimate, loops included; their share of peak is",
            "that of the formula's operations at the nominal peak; prefetch is what is moved between memories beside",
            "the computation, at the nominal bandwidth: where it takes more cycles than the computation, it decides.",
            "A + marks kernels, which are not in the estimate, and < a share that is less for it. Copies and",
            "transposes are counted as they stand in the program, once in a loop. Where real tokens are compared,",
            f"padded rows have {FILL:.0%} of them.",
            "",
            timing.table(rows),
            *(["", timing.table(ratios)] if found["comparisons"] else []),
        ]
    )


def _version() -> str:
    """libtpu's version, from the metadata beside it."""
    folders = Path(library()).parent.parent.glob("libtpu-*.dist-info")
    return ", ".join(folder.name.removeprefix("libtpu-").removesuffix(".dist-info") for folder in folders) or "unknown"


@click.command()
@click.option("--chip", "chips", multiple=True, type=click.Choice(list(CHIPS)), default=list(CHIPS))
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(SIZES)), default=list(SIZES))
@click.option("--shape", "shapes", multiple=True, help="Rows x length; default: those of each size in SHAPES.")
@click.option("--program", "programs", multiple=True, type=click.Choice(list(PROGRAMS)), default=list(PROGRAMS))
@click.option("--json", "to_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def main(chips, sizes, shapes, programs, to_json: bool, name: str | None) -> None:
    """Compiles for TPUs and prints the compiler's estimates."""
    prepare_environment()
    cases = []
    for chip in chips:
        for size in sizes:
            for shape in shapes or SHAPES[size]:
                for program in programs:
                    cases.append(compile_case(chip, size, shape, program))
                    click.echo(f"{chip} {size} {shape} {program} compiled", err=True)
    found = {
        "machine": timing.machine(),
        "libtpu": _version(),
        "command": " ".join(["python -m benchmarks.tpu", *sys.argv[1:]]),
        "label": "compiler estimate",
        "cases": cases,
        "comparisons": list(comparisons(cases)),
    }
    click.echo(json.dumps(found) if to_json else report(found))
    if name:
        click.echo(f"written to {timing.save(name, report(found), found)}", err=True)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.tpu")
