"""What every benchmark here shares: workers that take turns, medians, the machine's description, results on disk."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Worker:
    """A process that holds one library, answers requests one at a time, and idles while another one runs.

    Each library runs in a process of its own, so that neither's threads, allocator or memory disturbs the other's.
    """

    def __init__(self, module: str, *arguments: str):
        # The two libraries' thread pools are left at their defaults, one thread per core.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer. Raises `RuntimeError` if the process ended."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self._process.args} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def answer_requests(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A worker's main loop: a JSON line in, a JSON line out; whatever else is printed goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(handle(json.loads(line))) + "\n")
        replies.flush()


def peak_memory() -> int:
    """The most memory that this process ever held at once, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """The hardware, as far as the operating system tells, and the versions of what is compared."""
    flags = Path("/proc/cpuinfo").read_text()
    cpu = [line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")]
    packages = ("bertjax", "jax", "jaxlib", "flax", "torch", "transformers", "sentence-transformers", "tokenizers")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "features": [name for name in ("avx2", "avx512f", "amx_bf16", "amx_int8") if name in flags],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def save(name: str, report: str, data: Mapping[str, Any]) -> Path:
    """Writes a dated result, as text for a reader and as JSON; returns the text's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{data['machine']['date']}-{name}.md"
    path.write_text(report + "\n")
    path.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n")
    return path


def describe_machine(found: Mapping[str, Any]) -> str:
    """A few lines for the head of a report."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    features = ", ".join(found["features"])
    cpu = f"{found['cores']} cores of {found['cpu']} ({features})"
    return f"{found['date']}, {cpu}, Python {found['python']}\n{versions}"
