"""Versions and hardware, for the demo and the benchmarks (two copies vanish); p50_latencies vanishes: etp.benchmark."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """Return versions and hardware, for the report."""
    from importlib.metadata import PackageNotFoundError, version

    def one(library: str) -> str:
        try:
            return version(library)
        except PackageNotFoundError:
            return "not installed"

    from etp_graph._version import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "etp-graph": __version__,
        "torch": torch.__version__,
        **{library: one(library) for library in ("torch-pruning", "numpy", "scikit-learn")},
        "python": platform.python_version(),
        "device": device,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
