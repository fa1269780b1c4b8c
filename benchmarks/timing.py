"""What every benchmark here shares: workers, statistics, the machine's description, results on disk.

Standard library only: it also runs in the environments of libraries that bertjax knows nothing of.
"""

import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
# What of a CPU decides how fast matrix products can be.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
_PACKAGES = (
    "bertjax jax jaxlib flax optax numpy torch transformers sentence-transformers tokenizers onnxruntime onnx "
    "keras keras-hub"
).split()


class Worker:
    """A process that holds one library, answers requests one at a time, and idles while another one runs.

    Each library runs in a process of its own, so that neither's threads, allocator or memory disturbs the other's.
    What it writes to standard error is kept aside and shown if it ends.

    Args:
        module: what is run, as with `python -m`.
        *arguments: its arguments.
        python: the interpreter; default: this one.
        environment: variables set besides this process's own.
    """

    def __init__(
        self, module: str, *arguments: str, python: str = sys.executable, environment: Mapping[str, str] | None = None
    ):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the worker
        try:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=os.environ | dict(environment or {}),
                cwd=ROOT,
                text=True,
            )
        except OSError:
            self._errors.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer. Raises `RuntimeError` if the process ended."""
        # Where the process has ended, the missing answer says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the worker ended with status {status}: {self._errors.read()[-2000:].strip()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def answer_requests(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A worker's main loop: a JSON line in, a JSON line out; whatever else is printed goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(handle(json.loads(line))) + "\n")
        replies.flush()


def memory() -> int:
    """The memory that this process holds now, in bytes, mapped files included."""
    return _from_status("VmRSS")


def peak_memory() -> int:
    """The most memory that this process held at once, ever or since `forget_peak`, in bytes."""
    return _from_status("VmHWM")


def forget_peak() -> None:
    """Starts the peak anew from what the process holds now, where the kernel allows it."""
    # Where it fails the peak is that of the whole life, an upper bound.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _from_status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the ratios of what was measured in the same rounds."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def shown(values: Sequence[float], scale: float = 1.0) -> str:
    """The spread of some measurements, for a table: the median, and the least and the largest in brackets."""
    found = spread([value * scale for value in values])
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def model_name(folder: Path) -> str:
    """What a model's folder is called; packages have theirs in a folder `model`."""
    return folder.parent.name if folder.name == "model" else folder.name


def machine() -> dict[str, Any]:
    """The hardware, as far as the operating system tells, and the versions of what is compared."""
    flags = Path("/proc/cpuinfo").read_text()
    cpu = [line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "features": [name for name in _FEATURES if name in flags],
        "gpu": gpu_name(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the compared packages that this interpreter has."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpu_name() -> str | None:
    """The first NVIDIA GPU's name, or None where there is none; no library is loaded for it."""
    if shutil.which("nvidia-smi") is None:
        return None
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(ask, capture_output=True, text=True)
    names = done.stdout.split("\n")
    return names[0].strip() if done.returncode == 0 and names[0].strip() else None


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
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    features = ", ".join(found["features"])
    cpu = f"{found['cores']} cores of {found['cpu']} ({features})"
    gpu = f", one {found['gpu']}" if found.get("gpu") else ""
    return f"{found['date']}, {cpu}{gpu}, Python {found['python']}\n{named}"


def command(arguments: Sequence[str]) -> str:
    """The command line that makes a result again; of local paths only the last name is told."""
    shown = []
    for argument in arguments:
        name, equals, path = argument.rpartition("=")
        shown.append(name + equals + (Path(path).name if os.path.exists(path) else path))
    return shlex.join(["python", "-m", "benchmarks", *shown])
