"""The JSON of a run: what was measured under which conditions, written whole after every case.

A file belongs to one machine, one set of versions and one commit. Results of another are refused, never mixed.
"""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .cases import Case

SCHEMA = 2
# A run goes on in a file only where these are as they were.
SAME = (
    *("machine", "device", "threads", "driver", "python", "torch", "triton"),
    *("cuda", "cudnn", "onednn", "openvino", "onnxruntime", "timm", "commit", "sources"),
)


class RecordError(ValueError):
    """A results file that cannot be used; the message says which, why, and what to do."""


def conditions(device: str) -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to.

    `sources` is a digest of the kernels and of what chooses them: in a copy without git there is no commit.
    """
    from regnet_fast.inspect import info
    from regnet_fast.store.environment import kernels_digest

    facts = info.conditions(device)
    on_gpu = device.startswith("cuda")
    return {
        "device": device.partition(":")[0],
        "machine": facts["device"] if on_gpu else f"{facts['cpu']}, {facts['threads']} threads",
        "cpu": facts["cpu"],
        "threads": facts["threads"],
        "driver": facts["driver"],
        "python": facts["python"],
        "torch": facts["torch"],
        "triton": facts.get("triton"),
        "cuda": facts.get("CUDA") if on_gpu else None,
        "cudnn": facts.get("cuDNN") if on_gpu else None,
        "onednn": facts.get("oneDNN"),
        "openvino": facts.get("openvino") if device == "cpu" else None,
        "onnxruntime": facts.get("onnxruntime") if device == "cpu" else None,
        "timm": facts["timm"],
        "regnet_fast": facts["regnet_fast"],
        "commit": facts.get("commit"),
        "dirty": facts.get("dirty"),
        "sources": kernels_digest(),
    }


def slug(facts: dict[str, Any]) -> str:
    """A folder's name for a machine: cpu-amd-epyc-2-threads, nvidia-h200."""
    words = re.sub(r"[^a-z0-9]+", "-", facts["machine"].lower()).strip("-")
    return words if facts["device"] == "cuda" else f"cpu-{words}"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def new_run(kind: str, command: str, facts: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    """A run without cases."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": command,
        "conditions": facts,
        "started": now(),
        "finished": None,
        "ceilings": ceilings,
        "cases": [],
    }


def empty_case(case: Case) -> dict[str, Any]:
    """The record of a case of which nothing is known yet."""
    facts = {"id": case.id, "name": case.name, "batch": case.batch, "size": None, "dtype": case.dtype}
    outcome = {"status": "failed", "reason": "", "work": None, "variants": {}, "ratios": {}}
    return {**facts, "details": dict(case.details), **outcome}


def load(path: Path, kind: str | None = None) -> dict[str, Any]:
    """A run from its file. Raises RecordError for what is no run of this schema, or of another kind."""
    try:
        run = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{path}: is not JSON ({error}); move it away and measure again") from None
    schema = run.get("schema") if isinstance(run, dict) else None
    if schema != SCHEMA:
        raise RecordError(
            f"{path}: holds results of {'an older form' if schema is None else f'schema {schema!r}'}, this is schema "
            f"{SCHEMA}; move it away and measure again"
        )
    missing = [key for key in ("kind", "command", "conditions", "ceilings", "cases") if key not in run]
    if missing or not isinstance(run["cases"], list):
        raise RecordError(f"{path}: lacks {', '.join(missing) or 'a list of cases'}; move it away and measure again")
    if kind is not None and run["kind"] != kind:
        raise RecordError(f"{path}: holds {run['kind']}, not {kind}; name another file")
    return run


def save(run: dict[str, Any], path: Path) -> None:
    """Write a run in the place of what was there, all or nothing."""
    from regnet_fast.store import replace

    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(run, indent=1) + "\n").encode())


def resume(path: Path, kind: str, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The run to go on with, or None where the file is not there yet.

    Raises RecordError where it holds results of another machine, other versions or another commit.
    """
    if not path.exists():
        return None
    run = load(path, kind)
    before = run["conditions"]
    different = [key for key in SAME if before.get(key) != facts.get(key)]
    if different:
        said = "; ".join(f"{key} was {before.get(key)}, is {facts.get(key)}" for key in different)
        raise RecordError(f"{path}: holds results under other conditions ({said}); name another file or move it away")
    return run
