"""A worker's process: one peer, which loads when it is asked to, and then computes what it is asked to.

Runs in the peer's own environment; see `timing.Worker` and `harness.Entrant`.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.peers import PEERS, Absent, Loaded, Setting, load, prepare


def use_cores(threads: int) -> None:
    """Keeps this process to so many cores: XLA's pool has a thread for each, whatever else it is told."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def start(name: str, task: str, setting: Setting) -> tuple[Loaded | None, dict[str, Any]]:
    """Imports the peer and loads it; says how long that took and how much memory, or why it can't be done."""
    try:
        prepare(name, setting)
        begin = time.perf_counter()
        for module in PEERS[name].imports:
            importlib.import_module(module)
        imported = time.perf_counter()
        before = timing.memory()
        timing.forget_peak()
        loaded = load(name, task, setting)
    except Absent as error:
        return None, {"absent": str(error)}
    except Exception as error:
        traceback.print_exc()
        return None, {"absent": f"can't be loaded: {summary(error)}"}
    return loaded, {
        "import_s": imported - begin,
        "load_s": time.perf_counter() - imported,
        "load_memory": timing.peak_memory() - before,
        "versions": timing.versions(),
    }


def summary(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_inputs(path: Path) -> list[Any]:
    """Inputs as `harness.write_inputs` left them: lists of texts, or dicts of arrays."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        stacked = dict(arrays)
    return [dict(zip(stacked, values, strict=True)) for values in zip(*stacked.values(), strict=True)]


def first(loaded: Loaded, inputs: list[Any], save: str) -> dict[str, Any]:
    """Computes each input once and keeps the results; the first one's time includes compiling."""
    timing.forget_peak()
    begin = time.perf_counter()
    results = [loaded.fetch(loaded.run(inputs[0]))]
    seconds = time.perf_counter() - begin
    results += [loaded.fetch(loaded.run(each)) for each in inputs[1:]]
    np.save(save, np.stack(results).astype(np.float32))
    return {"first_s": seconds}


def measure(loaded: Loaded, inputs: list[Any], calls: int, queued: bool) -> dict[str, Any]:
    """Times so many calls, taking the inputs in turn; each is waited for or, if `queued`, all of them at the end."""
    begin = time.perf_counter()
    for index in range(calls):
        result = loaded.run(inputs[index % len(inputs)])
        if not queued:
            loaded.wait(result)
    loaded.wait(result)
    seconds = (time.perf_counter() - begin) / calls
    device = loaded.device_memory() if loaded.device_memory else None
    return {"seconds": seconds, "memory": timing.peak_memory(), "device_memory": device}


def main() -> None:
    """Answers requests until there are no more."""
    given = json.loads(sys.argv[1])
    name, task = given.pop("peer"), given.pop("task")
    paths = {field: Path(given[field]) if given[field] else None for field in ("model", "exported")}
    setting = Setting(**given | paths)
    use_cores(setting.threads)
    loaded, is_used, cached = None, False, {}

    def inputs_of(path: str) -> list[Any]:
        if path not in cached:
            cached[path] = read_inputs(Path(path))
        return cached[path]

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal loaded, is_used
        operation = request["operation"]
        if operation == "start":
            loaded, answer = start(name, task, setting)
            return answer
        try:
            inputs = inputs_of(request["inputs"])
            if operation == "first":
                if task == "train" and is_used:  # steps change the weights, and every case begins with those on disk
                    loaded = None
                    loaded = load(name, task, setting)
                is_used = True
                return first(loaded, inputs, request["save"])
            if operation == "lengths":
                return {"lengths": [loaded.lengths(texts) for texts in inputs]}
            return measure(loaded, inputs, request["calls"], setting.device == "gpu")
        except Exception as error:
            traceback.print_exc()
            return {"failed": summary(error)}

    timing.answer_requests(handle)


if __name__ == "__main__":
    main()
