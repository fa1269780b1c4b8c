"""The comparison itself: peers start, are checked against a reference, and take turns.

Every peer has a process of its own and the same cores. A round asks each of them once, in the same order (A B A B ...);
what is compared are the times of one round, so that whatever slows the machine for a while slows all of them.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.peers import PEERS

#: How far a peer's results may be from the reference's: the largest absolute difference in float32, else 1 - cosine.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 2e-1}
# A turn takes about this long, as far as the calls divide it, so that a short call is not timed alone.
_TURN_SECONDS = 0.5
_MOST_CALLS = 200
# Threads of the one before may still wait for work in a busy loop.
_PAUSE_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is the same for all peers of a run.

    Attributes:
        task: "dense", "text" or "train".
        model: a model's folder.
        device: "cpu" or "gpu".
        threads: how many threads each peer may use.
        pythons: interpreters of peers with environments of their own, by name.
        exported: a folder where exported models are kept.
        folder: a folder for what the processes hand each other.
        rounds: how many rounds are measured.
        burn_in: how many rounds are run before.
        probe_size: rows and columns of the matrices that the probes multiply.
    """

    task: str
    model: Path
    device: str
    threads: int
    pythons: dict[str, str]
    exported: Path
    folder: Path
    rounds: int
    burn_in: int
    probe_size: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to compute.

    Attributes:
        name: what it is called.
        inputs: the file of its inputs; calls take them in turn.
        tokens: real tokens in a call, on average.
        flops: operations in a call, on average, by the formula.
        texts: texts in a call, on average.
    """

    name: str
    inputs: Path
    tokens: float
    flops: float
    texts: float


class Entrant:
    """A peer in one dtype, in its process.

    Attributes:
        peer: its name in `PEERS`.
        dtype: what it computes in.
        start: what `worker.start` said; it has "absent" if the peer can't take part.
    """

    def __init__(self, peer: str, dtype: str, plan: Plan, task: str | None = None, model: Path | None = None):
        self.peer, self.dtype = peer, dtype
        self._worker = None
        if PEERS[peer].elsewhere and peer not in plan.pythons:
            self.start = {"absent": f"needs an environment of its own: --python {peer}=PYTHON"}
            return
        setting = {
            "peer": peer,
            "task": task or plan.task,
            "model": str(model or plan.model),
            "dtype": dtype,
            "device": plan.device,
            "threads": plan.threads,
            "exported": str(plan.exported),
            "probe_size": plan.probe_size,
        }
        try:
            self._worker = timing.Worker(
                "benchmarks.worker",
                json.dumps(setting),
                python=plan.pythons.get(peer, sys.executable),
                environment=_environment(plan),
            )
            self.start = self.ask("start")
        except (OSError, RuntimeError) as error:
            self.close()
            self.start = {"absent": f"can't be started: {error}"}

    @property
    def absent(self) -> str | None:
        """Why the peer can't take part, or None."""
        return self.start.get("absent")

    def ask(self, operation: str, **request: Any) -> dict[str, Any]:
        """Asks the process; see `worker.main`. A process that ends has failed, which is an answer, too."""
        try:
            return self._worker.ask(operation=operation, **request)
        except RuntimeError as error:
            if operation == "start":
                raise
            return {"failed": str(error)}

    def close(self) -> None:
        """Ends the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _environment(plan: Plan) -> dict[str, str]:
    """Variables that give every library the same threads and the same device."""
    threads = {name: str(plan.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    device = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if plan.device == "cpu":
        device = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # torch.compile would otherwise find what it compiled in an earlier run, and the others start from nothing.
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(plan.folder / "inductor")}
    quiet = {"HF_HUB_OFFLINE": "1", "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return threads | device | compiled | quiet


@contextmanager
def entrants(plan: Plan, wanted: Iterable[tuple[str, str, str]]) -> Iterator[list[Entrant]]:
    """Starts peers, each given as its name, dtype and task, one after another; ends them afterwards."""
    started = []
    try:
        for peer, dtype, task in wanted:
            started.append(Entrant(peer, dtype, plan, task))
        yield started
    finally:
        for entrant in started:
            entrant.close()


def write_inputs(path: Path, inputs: Sequence[Any]) -> Path:
    """Writes inputs for the workers: lists of texts, or dicts of arrays of equal shapes."""
    if isinstance(inputs[0], dict):
        path = path.with_suffix(".npz")
        np.savez(path, **{name: np.stack([each[name] for each in inputs]) for name in inputs[0]})
        return path
    path = path.with_suffix(".json")
    path.write_text(json.dumps(inputs))
    return path


def references(plan: Plan, peer: str, cases: Sequence[Case], model: Path, name: str) -> dict[str, Path]:
    """What a peer computes in float32 for each case, as files by the case's name; its process has ended by then."""
    entrant = Entrant(peer, "float32", plan, model=model)
    try:
        if entrant.absent:
            raise RuntimeError(f"{peer}, the reference, {entrant.absent}")
        found = {}
        for number, case in enumerate(cases):
            found[case.name] = plan.folder / f"{name}-{number}.npy"
            answer = entrant.ask("first", inputs=str(case.inputs), save=str(found[case.name]))
            if "failed" in answer:
                raise RuntimeError(f"{peer}, the reference, fails at {case.name}: {answer['failed']}")
        return found
    finally:
        entrant.close()


def difference(result: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far results [..., dim] are from the reference's: largest absolute difference, and 1 - the least cosine.

    Of losses [steps], which have no angle, the latter is the largest relative difference.
    """
    if result.shape != reference.shape:
        return {"largest": float("inf"), "cosine_distance": float("inf")}
    largest = float(np.abs(result - reference).max())
    if reference.ndim < 2:
        return {"largest": _finite(largest), "cosine_distance": _finite(np.abs(result / reference - 1).max())}
    a, b = result.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    distance = 1 - float(((a * b).sum(-1) / norms).min())
    # A NaN is as far away as can be, not unknown.
    return {"largest": _finite(largest), "cosine_distance": max(0.0, _finite(distance))}


def _finite(value: float) -> float:
    return float(value) if np.isfinite(value) else float("inf")


def agrees(found: dict[str, float], dtype: str) -> bool:
    """Whether a difference is within `LIMITS`."""
    return found["largest" if dtype == "float32" else "cosine_distance"] <= LIMITS[dtype]


def check(entrant: Entrant, case: Case, reference: Path | None, folder: Path) -> dict[str, Any]:
    """An entrant's first call of a case and, where there is a reference, how far its result is from it.

    Returns "first_s" and "difference", or "failed": why nothing is timed.
    """
    file = folder / "result.npy"
    answer = entrant.ask("first", inputs=str(case.inputs), save=str(file))
    if "failed" in answer or reference is None:
        return answer
    answer["difference"] = difference(np.load(file), np.load(reference))
    if not agrees(answer["difference"], entrant.dtype):
        found = answer["difference"]
        answer["failed"] = (
            f"disagrees with the reference: largest difference {found['largest']:.1e}, "
            f"cosine distance {found['cosine_distance']:.1e}"
        )
    return answer


def take_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """The order in which entrants are asked: all of them, again and again, always in the same order."""
    return itertools.product(range(rounds), names)


def measure(plan: Plan, group: Sequence[Entrant], case: Case) -> list[dict[str, Any]]:
    """Burn-in and measured rounds of one case; an answer for each entrant, with the seconds of a call by round."""
    calls = [1] * len(group)
    answers: list[dict[str, Any]] = [{"seconds": []} for _ in group]
    for number, index in take_turns(range(len(group)), plan.burn_in + plan.rounds):
        answer = answers[index]
        if "failed" in answer:
            continue
        time.sleep(_PAUSE_SECONDS)
        turn = group[index].ask("measure", inputs=str(case.inputs), calls=calls[index])
        if "failed" in turn:
            answer["failed"] = turn["failed"]
        elif number < plan.burn_in:
            calls[index] = min(_MOST_CALLS, max(1, round(_TURN_SECONDS / turn["seconds"])))
        else:
            answer["seconds"].append(turn.pop("seconds"))
            answer.update(turn, calls=calls[index])
    return answers


def compare(
    plan: Plan, group: Sequence[Entrant], cases: Sequence[Case], reference: dict[str | None, dict[str, Path]]
) -> list[dict[str, Any]]:
    """Checks and times all cases; returns a row for each case and entrant.

    Args:
        plan: the run.
        group: the entrants; those that are absent are passed over.
        cases: what is computed.
        reference: the references' results by `Peer.gelu` and by the case's name.
    """
    rows = []
    present = [entrant for entrant in group if not entrant.absent]
    for case in cases:
        checks = []
        for entrant in present:
            expected = None if _is_probe(entrant) else reference[PEERS[entrant.peer].gelu].get(case.name)
            checks.append(check(entrant, case, expected, plan.folder))
        good = [entrant for entrant, found in zip(present, checks, strict=True) if "failed" not in found]
        timed = dict(zip(map(id, good), measure(plan, good, case), strict=True))
        for entrant, found in zip(present, checks, strict=True):
            rows.append(_row(plan, entrant, case, found | timed.get(id(entrant), {})))
    return rows


def _is_probe(entrant: Entrant) -> bool:
    return "probe" in PEERS[entrant.peer].loaders


def _row(plan: Plan, entrant: Entrant, case: Case, found: dict[str, Any]) -> dict[str, Any]:
    row = {"case": case.name, "peer": entrant.peer, "dtype": entrant.dtype, "probe": _is_probe(entrant)}
    work = {"tokens": case.tokens, "texts": case.texts, "flops": case.flops}
    if _is_probe(entrant):
        work = {"tokens": 0, "texts": 0, "flops": 2 * plan.probe_size**3}
    if found.get("seconds"):
        found["compile_s"] = max(0.0, found["first_s"] - statistics.median(found["seconds"]))
    return row | work | found
