"""A job's folder: its manifest, and shards that are complete or absent, each written by one worker only.

    OUT/part-00000.parquet     the shards; row i of all of them, in order, is row i of the inputs
    OUT/_bad/part-00000.jsonl  the bad rows of a shard that has some
    OUT/_job/job.json          the fingerprint and the plan
    OUT/_job/part-00000.json   what is in a shard, in numbers
    OUT/_summary.json          written when every shard is there

Nothing that reads a folder of Parquet files looks at names that begin with "_" or ".".
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bertjax.corpus.windows import Counts
from bertjax.errors import JobError, SourceError
from bertjax.json_files import read_json

_SUMMARY = "_summary.json"


class JobFolder:
    """The folder of a job's results.

    Args:
        path: the folder.
        suffix: how names of shards end, ".parquet" or ".npy".
    """

    def __init__(self, path: Path, suffix: str):
        self.path, self._suffix = path, suffix
        self.manifest = path / "_job" / "job.json"

    def make(self) -> None:
        """Makes the folder, unless it is there. Raises `JobError` where something else is in it."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            strange = sorted(each.name for each in self.path.iterdir() if not each.name.startswith((".", "_")))
            if strange and not self.manifest.exists():
                raise JobError(
                    f"{self.path}: holds {strange[0]} and no job; name another folder, or remove what is in it"
                )
            (self.path / "_job").mkdir(exist_ok=True)

    def shard(self, index: int) -> Path:
        """The path of a shard."""
        return self.path / f"part-{index:05}{self._suffix}"

    def _counts(self, index: int) -> Path:
        return self.path / "_job" / f"part-{index:05}.json"

    def is_done(self, index: int) -> bool:
        """Whether a shard is there. Raises `JobError` if it is not as it was written."""
        try:
            size = self.shard(index).stat().st_size
        except FileNotFoundError:
            return False
        expected = _read(self._counts(index), self.shard(index))["bytes"]
        if size != expected:
            raise JobError(
                f"{self.shard(index)}: has {size} bytes, {expected} were written; remove it to have it made again"
            )
        return True

    def counts(self, index: int) -> Counts:
        """What is in a shard that is done."""
        saved = _read(self._counts(index), self.shard(index))
        return Counts(**{name: value for name, value in saved.items() if name != "bytes"})

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other worker is in a block of this."""
        path = self.path / "_job" / "plan.lock"
        lock = _lock(path, wait=True)
        try:
            yield
        finally:
            _unlock(path, lock)

    def claim(self, index: int) -> "Claim | None":
        """Takes a shard for this worker, or None if it is done or another worker has it.

        A claim ends with the process, however that ends. What a dead worker left behind is removed.
        """
        path = self.path / "_job" / f"part-{index:05}.lock"
        lock = None if self.is_done(index) else _lock(path, wait=False)
        if lock is None:
            return None
        name = self.shard(index).name
        claim = Claim(self, index, self.path / f".{name}.{secrets.token_hex(8)}.tmp", path, lock)
        try:
            if self.is_done(index):  # since it was looked at first
                claim.release()
                return None
            self._sweep(f".{self.shard(index).stem}.*.tmp")
        except BaseException:
            claim.release()
            raise
        return claim

    def _sweep(self, pattern: str) -> None:
        """Removes what dead workers left behind, of files with such names."""
        for folder in (self.path, self.path / "_job", self.path / "_bad"):
            for left in folder.glob(pattern):
                left.unlink(missing_ok=True)

    def publish(self, claim: "Claim", counts: Counts, bad: list[dict[str, Any]]) -> None:
        """Puts a shard that is written in its place, after all that is told of it.

        Raises:
            SourceError: something can't be written.
            JobError: the shard is there already, from somebody who had no claim.
        """
        target = self.shard(claim.index)
        with writing(target):
            size = flushed(claim.temporary)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
            of_bad = self.path / "_bad" / f"{target.stem}.jsonl"
            if bad:
                of_bad.parent.mkdir(exist_ok=True)
                replace(of_bad, lines)
            else:
                of_bad.unlink(missing_ok=True)
            replace(self._counts(claim.index), json.dumps({**dataclasses.asdict(counts), "bytes": size}) + "\n")
            try:
                os.link(claim.temporary, target)  # unlike a rename, it fails where something is
            except FileExistsError:
                raise JobError(
                    f"{target}: was written by somebody else meanwhile; is it on a disk without locks?"
                ) from None
            claim.temporary.unlink()
            flushed(self.path)

    def has_summary(self) -> bool:
        """Whether the job was found to be done before."""
        return (self.path / _SUMMARY).exists()

    def summarise(self, summary: dict[str, Any]) -> None:
        """Writes the summary, which says that the job is done: nobody writes shards any more."""
        with writing(self.path / _SUMMARY):
            self._sweep(".part-*.tmp")
            self._sweep("part-*.lock")
            replace(self.path / _SUMMARY, json.dumps(summary, indent=2) + "\n")


@dataclasses.dataclass
class Claim:
    """A shard that is this worker's to write, until `release`.

    Attributes:
        folder: the job's folder.
        index: the shard's number.
        temporary: where to write it.
    """

    folder: JobFolder
    index: int
    temporary: Path
    _path: Path
    _lock: int

    def release(self) -> None:
        """Gives the shard up; what was written and not published is removed."""
        with contextlib.suppress(OSError):
            self.temporary.unlink()
        _unlock(self._path, self._lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """Takes a lock file and gives its descriptor, or None if another has it and `wait` is false."""
    with writing(path):
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(descriptor)
                return None
            if _is_same(descriptor, path):
                return descriptor
            os.close(descriptor)  # whoever had it removed it between the two calls


def _unlock(path: Path, descriptor: int) -> None:
    """Removes a lock file that is held, and lets go of it."""
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def replace(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flushed(temporary)
        temporary.replace(path)
        flushed(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flushed(path: Path) -> int:
    """Brings a file or a folder to the disk; gives its size."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Makes an `OSError` a `SourceError` that names what was to be written."""
    try:
        yield
    except SourceError:
        raise
    except OSError as problem:
        why = problem.strerror or " ".join(str(problem).split())
        raise SourceError(f"{target}: can't be written ({why}); what was finished before it stays") from None


def _read(path: Path, shard: Path) -> dict[str, Any]:
    try:
        found = read_json(path, JobError)
        if set(found) == {"bytes", *(field.name for field in dataclasses.fields(Counts))}:
            return found
        raise JobError(f"{path}: does not say what is in {shard}; remove the shard to have it made again")
    except SourceError:
        raise JobError(f"{shard}: is there, and {path}, which says what is in it, is not; remove the shard") from None
