"""Measurements in processes of their own: a crash, an endless loop or a lack of memory is a result too."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "torch-geometric", "torch-pruning")


def run_apart(module: str, payload: dict[str, Any], *, limit: float, threads: int) -> dict[str, Any]:
    """What ``python -m module --one JSON`` prints as its last line, or a verdict why it printed nothing."""
    command = [sys.executable, "-m", module, "--one", json.dumps(payload)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    try:
        done = subprocess.run(  # noqa: S603 - this program itself
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"verdict": f"no answer in {limit:.0f} s", "seconds": limit}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return {"verdict": f"exception: {last[0]}", "seconds": time.perf_counter() - start}


def conditions() -> dict[str, str]:
    """Versions and hardware."""
    cpu = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    return {
        **{name: version(name) for name in _LIBRARIES if find_spec(name.replace("-", "_"))},
        "python": platform.python_version(), "cpu": cpu or platform.processor(), "cores": str(os.cpu_count()),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
