"""Describe the machine: versions of libraries and hardware, for the records of the demo and of the benchmarks."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from etp_graph import __version__


def machine_record(libraries: Iterable[str], *, accelerator: bool = True) -> dict[str, str]:
    """Return versions and hardware, as texts for a report.

    Args:
        libraries: names of distributions whose versions are listed.
        accelerator: name the GPU as the device if there is one; False for measurements on the processor.
    """
    on_gpu = accelerator and torch.cuda.is_available()
    return {
        "etp-graph": __version__,
        **{library: _version(library) for library in libraries},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cpus": str(os.cpu_count()),
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
