"""Events for TensorBoard, written by its own package, without TensorFlow.

tensorboardX would need less, and imports torch wherever that is installed.
"""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Events:
    """A file of events.

    Args:
        folder: where it is made.
        first_step: TensorBoard drops what earlier files there have of this step and later ones.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the file can't be made.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._records = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the metrics of a step, by their names."""
        values = [self._summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Ends the file."""
        self._records.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()
