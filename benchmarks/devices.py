"""Training over several devices: what is learnt is what one device learns, and what each of them holds.

    python -m benchmarks.devices --text FILE [--devices N] [--save NAME]

A new BERT learns masked words, in processes of one device, of several with the parameters on each, and of several with
parameters and the optimiser's state divided. Where there are not as many devices, CPU devices are simulated: those
share the cores, so nothing is timed.
"""

import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import timing

KINDS = ("one", "replicated", "full")
# XLA's name for what it allocates beside arguments and results.
_COLUMNS = {"state": "parameters and state, MB", "batch": "batch, MB", "temporary": "temporary, MB"}


def work(kind: str, path: str) -> dict[str, Any]:
    """Takes all steps; gives their losses, and the bytes that a device holds."""
    import jax

    import bertjax
    from bertjax.sharding import FULLY_SHARDED, RULES, batch_sharding, bytes_per_device, data_mesh, shardings_of
    from bertjax.training import AdamW, new_state, train_step

    job = pickle.loads(Path(path).read_bytes())
    model = bertjax.from_pretrained(job["start"], bertjax.BertForMaskedLM)
    optimizer = AdamW(learning_rate=job["rate"], warmup_steps=0.1).build(model, len(job["steps"]))
    mesh = data_mesh(jax.devices()[:1] if kind == "one" else jax.devices())
    state = new_state(model, optimizer, seed=0)
    shardings = shardings_of(state, mesh, FULLY_SHARDED if kind == "full" else RULES)
    state = jax.device_put(state, shardings)
    step = train_step(model, optimizer, shardings=shardings, max_predictions=job["most"])
    batches = [jax.device_put(batch, batch_sharding(mesh)) for batch in job["steps"]]
    held = {"state": bytes_per_device(state), "batch": max(map(bytes_per_device, batches))}
    largest = max(batches, key=bytes_per_device)
    analysis = step.lower(state, largest).compile().memory_analysis()
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return {"losses": losses, "bytes": held | {"temporary": analysis.temp_size_in_bytes}}


def run(kind: str, path: Path) -> dict[str, Any]:
    """What a process of its own says."""
    worker = timing.Worker("benchmarks.devices", "--work", kind, str(path))
    found = worker.ask()
    worker.close()
    return found


def report(found: dict[str, Any], devices: int, machine: dict[str, Any], command: str) -> str:
    """What was found, for a person to read."""
    names = {"one": "one device", "replicated": f"{devices}, replicated", "full": f"{devices}, fully sharded"}
    rows = [["", *_COLUMNS.values(), "first loss", "last loss", "largest difference in loss"]]
    for kind, each in found.items():
        sizes = [f"{each['bytes'][name] / 1e6:.2f}" for name in _COLUMNS]
        difference = np.abs(np.subtract(each["losses"], found["one"]["losses"])) / found["one"]["losses"]
        ends = [f"{each['losses'][place]:.6f}" for place in (0, -1)]
        rows.append([names[kind], *sizes, *ends, f"{difference.max():.1e}"])
    return "\n".join(
        [
            f"# Training over {devices} devices: what each holds, and what is learnt",
            "",
            timing.describe_machine(machine),
            "",
            f"`{command}`",
            "",
            timing.table(rows),
            "",
            f"{len(found['one']['losses'])} steps of AdamW with dropout; sizes are of one device, temporary memory "
            "as XLA plans it; differences are relative to one device's loss, of any step.",
        ]
    )


@click.command()
@click.option("--text", required=True, help="A text a line.")
@click.option("--devices", default=8, show_default=True)
@click.option("--steps", default=50, show_default=True)
@click.option("--size", default="mini", show_default=True, help="tiny, mini, small, ...")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def main(text: str, devices: int, steps: int, size: str, name: str | None) -> None:
    """Compares training over several devices with one."""
    # For this process, which makes the batches for as many devices, and for those that it starts.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    from benchmarks.learn import job_of, new_bert
    from bertjax.sharding import data_mesh
    from bertjax.training.batches import Batches

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task, examples, _ = new_bert(text, 8000, size, folder)
        batches = Batches(task, examples, batch_size=32, mesh=data_mesh())
        path = folder / "job.pickle"
        path.write_bytes(pickle.dumps(job_of("words", folder / "start", batches, steps, 1e-3)))
        found = {kind: run(kind, path) for kind in KINDS}
    command = f"python -m benchmarks.devices --text FILE --devices {devices} --steps {steps} --size {size}"
    machine = timing.machine()
    result = report(found, devices, machine, command)
    click.echo(result)
    if name:
        data = {"machine": machine, "command": command, "found": found}
        click.echo(f"written to {timing.save(name, result, data)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        timing.answer_requests(lambda _: work(*sys.argv[2:]))
    else:
        main(prog_name="python -m benchmarks.devices")
