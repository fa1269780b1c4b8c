"""The lines of metrics.jsonl."""

import contextlib
import json
from typing import Any

from bertjax.checks import as_integer

METRICS = "metrics.jsonl"
#: What a line has beside metrics.
RESERVED = ("step", "kind", "seconds")


def read_lines(data: bytes) -> list[dict[str, Any]]:
    """The lines of a log; what is none is left out, such as half of one, written when the process was killed."""
    entries = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and as_integer(entry.get("step")) is not None and "kind" in entry:
                entries.append({"seconds": 0.0} | entry)
    return entries
