"""What decides a job's bytes, kept in its folder, so that a resume goes on with the same job or not at all."""

import json
from typing import Any

from bertjax.corpus.folder import JobFolder, replace, writing
from bertjax.corpus.inputs import find_inputs
from bertjax.corpus.job import Job, Plan
from bertjax.errors import JobError
from bertjax.json_files import read_file

#: Of the layout of a job's folder and of its shards' bytes.
VERSION = 1
# A manifest lists the inputs, at some 150 bytes each.
_MAX_BYTES = 1 << 28
# Differences that a message names.
_SHOWN = 5


def fingerprint(job: Job) -> dict[str, Any]:
    """Everything that decides the bytes, by name, as JSON; what is settled by the plan is not in it."""
    return {
        "version": VERSION,
        **job.work.identity(),
        "text": None if job.text is None else list(job.text),
        "id": job.id,
        "keep": list(job.keep),
        "format": job.format,
        "shard_rows": job.shard_rows,
    }


def save(folder: JobFolder, job: Job, plan: Plan) -> None:
    """Writes the manifest."""
    with writing(folder.manifest):
        content = {"fingerprint": fingerprint(job), "plan": plan.to_json()}
        replace(folder.manifest, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(folder: JobFolder, job: Job) -> Plan | None:
    """The plan of a job that was started before, or None.

    Raises:
        JobError: the folder's job is another one, or its inputs have changed; says in what.
    """
    if not folder.manifest.exists():
        return None
    try:
        saved = json.loads(read_file(folder.manifest, _MAX_BYTES, JobError))
        plan = Plan.from_json(saved["plan"])
        differences = _differences(saved["fingerprint"], json.loads(json.dumps(fingerprint(job))))
    except (ValueError, KeyError, TypeError) as problem:
        if isinstance(problem, JobError):
            raise
        raise JobError(f"{folder.manifest}: is no manifest of a job ({problem}); write to another folder") from None
    differences += _changed_files(job, plan)
    if differences:
        shown = "; ".join(differences[:_SHOWN])
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise JobError(
            f"{folder.path}: holds another job, and results of both would be mixed: {shown}{more}. Give the same "
            "options and inputs to go on with it, or another folder to start anew"
        )
    return plan


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in names]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}...{text[-4:]}"


def _changed_files(job: Job, plan: Plan) -> list[str]:
    found = {file.path: file for file in find_inputs(job.inputs, without=job.out)}
    planned = {file.path: file for file in plan.files}
    changed = [f"{path} is new" for path in found if path not in planned]
    changed += [f"{path} is gone" for path in planned if path not in found]
    for path in found.keys() & planned.keys():
        if found[path] != planned[path]:
            changed.append(f"{path} has changed since")
    if not changed and list(found) != list(planned):
        changed.append("the inputs come in another order")
    return sorted(changed)
