"""A training step compiled ahead of time for a slice of TPUs, on a machine without one: does it fit, what is divided.

    python -m benchmarks.tpu_train [--chip NAME ...] [--size NAME] [--shape BxL] [--json] [--save NAME]

Masked language modelling in bfloat16 with float32 parameters, packed rows, AdamW; over the smallest slice that the
compiler knows, once with parameters on every device and once fully sharded. It needs libtpu; see `benchmarks.tpu`.
Every figure is the COMPILER'S ESTIMATE, never a measurement; cycles leave out waiting for memory and for other devices.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import click

from benchmarks import timing, tpu
from benchmarks.hlo import Program
from benchmarks.workloads import MASKED, parse_shape

RULES = ("replicated", "fully sharded")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter")


def lower_step(devices: Sequence[Any], size: str, shape: str, rules: str, dropout: float = 0.1, **options: Any) -> Any:
    """A step over these devices, lowered for them.

    Args:
        devices: what it is to run on.
        size: one of `tpu.SIZES`.
        shape: rows and length of a device's part of a batch.
        rules: one of `RULES`.
        dropout: the rate of all kinds of dropout.
        **options: of the model.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from bertjax import BertConfig, BertForMaskedLM, functional
    from bertjax.sharding import FULLY_SHARDED, batch_sharding, data_mesh, shardings_of
    from bertjax.sharding import RULES as REPLICATED
    from bertjax.training import AdamW, new_state, train_step

    layers, hidden, heads, intermediate = tpu.SIZES[size]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**sizes, **rates, intermediate_size=intermediate)
    options |= {"dtype": jnp.bfloat16, "param_dtype": "float32"}
    model = nnx.eval_shape(lambda: BertForMaskedLM(config, rngs=nnx.Rngs(0), **options))
    optimizer = AdamW().build(model, 1000)
    rows, length = parse_shape(shape)
    mesh = data_mesh(devices)
    state = jax.eval_shape(lambda params: new_state(params, optimizer), functional(model)[1])
    shardings = shardings_of(state, mesh, FULLY_SHARDED if rules == "fully sharded" else REPLICATED)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, shardings
    )
    names = ("input_ids", "token_type_ids", "position_ids", "segment_ids", "labels")
    divided = jax.ShapeDtypeStruct((rows * mesh.size, length), jnp.int32, sharding=batch_sharding(mesh))
    most = int(MASKED * rows * mesh.size * length)
    step = train_step(model, optimizer, shardings=shardings, max_predictions=most)
    return step.lower(state, dict.fromkeys(names, divided))


def compile_step(chip: str, size: str, shape: str, rules: str) -> dict[str, Any]:
    """Compiles a step; returns what the compiler says of it."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu.CHIPS[chip].topology).devices
    rows, length = parse_shape(shape)
    begin = time.perf_counter()
    compiled = lower_step(devices, size, shape, rules).compile()
    seconds = time.perf_counter() - begin
    text = compiled.as_text()
    program, memory = Program(text), compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    products = program.matmuls()
    return {
        "chip": chip,
        "devices": len(devices),
        "size": size,
        "shape": shape,
        "rules": rules,
        "state_bytes": memory.argument_size_in_bytes,
        "memory_bytes": used,
        "fits": used <= tpu.CHIPS[chip].memory,
        "cycles_per_position": program.cycles() / (rows * length),
        "matmuls": len(products),
        "float32_matmuls": sum("f32" in dtypes for dtypes in products),
        "collectives": {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in _COLLECTIVES},
        "compile_seconds": seconds,
    }


def report(cases: list[dict[str, Any]], machine: dict[str, Any], command: str) -> str:
    """What the compiler says, for a person to read."""
    rows = [
        ["", "devices", "parameters", "state, MB a device", "memory, MB a device", "cycles a position", *_COLLECTIVES]
    ]
    for each in cases:
        sizes = [f"{each[name] / 1e6:,.0f}" for name in ("state_bytes", "memory_bytes")]
        found = [str(each["collectives"][name]) for name in _COLLECTIVES]
        where = f"{each['chip']}, {each['size']}, {each['shape']} a device"
        rows.append([where, str(each["devices"]), each["rules"], *sizes, f"{each['cycles_per_position']:,.0f}", *found])
    title = "# A masked-language-modelling step for slices of TPUs: COMPILER ESTIMATES, not measured"
    return "\n".join([title, "", timing.describe_machine(machine), "", f"`{command}`", "", timing.table(rows)])


@click.command()
@click.option(
    "--chip", "chips", multiple=True, type=click.Choice(list(tpu.CHIPS)), default=["v5e", "v6e"], show_default=True
)
@click.option("--size", type=click.Choice(list(tpu.SIZES)), default="base", show_default=True)
@click.option("--shape", default="32x128", show_default=True, help="Rows and length of a device's part of a batch.")
@click.option("--json", "to_json", is_flag=True, help="Print JSON.")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def main(chips: tuple[str, ...], size: str, shape: str, to_json: bool, name: str | None) -> None:
    """Compiles a training step for slices of TPUs."""
    tpu.prepare_environment()
    cases = [compile_step(chip, size, shape, rules) for chip in chips for rules in RULES]
    if to_json:
        click.echo(json.dumps(cases))
        return
    command = (
        f"python -m benchmarks.tpu_train {' '.join(f'--chip {chip}' for chip in chips)} --size {size} --shape {shape}"
    )
    machine = timing.machine()
    text = report(cases, machine, command)
    click.echo(text)
    if name:
        data = {"machine": machine, "command": command, "cases": cases}
        click.echo(f"written to {timing.save(name, text, data)}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.tpu_train")
