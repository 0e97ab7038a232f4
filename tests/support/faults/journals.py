"""Change journals as somebody would who knows how they are sealed, or turn them into those of version 0.1.0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from etp_graph.checkpoint import sealed
from etp_graph.compression import JOURNAL_FILE


def read_body(folder: Path) -> dict[str, Any]:
    """Return the content of a journal without its digest."""
    body: dict[str, Any] = json.loads((folder / JOURNAL_FILE).read_text())
    body.pop("digest", None)
    return body


def write_body(folder: Path, body: dict[str, Any], *, files: bool = True) -> None:
    """Write a journal with a digest; without ``files`` as version 0.1.0 did, with neither digest nor SHA-256."""
    if not files:
        later = ("files", "training_state")
        body = {**body, "steps": [{k: v for k, v in step.items() if k not in later} for step in body["steps"]]}
    (folder / JOURNAL_FILE).write_text(json.dumps(sealed(body) if files else body))


def copy_steps(folder: Path, target: Path, names: list[str]) -> None:
    """Copy the folders of the named steps."""
    for name in names:
        if not (target / name).exists():
            shutil.copytree(folder / name, target / name)
