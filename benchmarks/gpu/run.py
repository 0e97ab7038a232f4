"""Run the queue on a GPU for some minutes, several runs at once, and pack what is needed to go on.

``python -m benchmarks gpu --minutes 9 --state FOLDER`` is for preemptible machines, which keep nothing.
It unpacks the archives in FOLDER, if there are any, starts several workers of ``contest queue`` that share the work,
stops them in time, and packs the lines, the checkpoints and the states of unfinished runs into FOLDER again. A run goes
on at its last pass over the data.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from rich.console import Console

from benchmarks.queue.plan import GPU_PLAN

NAME = "gpu-state-{:02d}.tar"
LIMIT = 15 * 2**20
"""Bytes of an archive, unless a single file is larger."""
END = tarfile.RECORDSIZE
"""Bytes of an archive beside its files, at most."""
GRACE = 10.0
"""Seconds that a worker has to end after the signal."""


def unpack(state: Path, folder: Path) -> int:
    """Unpack the archives of an earlier call; how many there were."""
    archives = sorted(state.glob(NAME.replace("{:02d}", "*")))
    for archive in archives:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    return len(archives)


def pack(folder: Path, state: Path, limit: int = LIMIT) -> list[Path]:
    """Pack all files of a folder into archives of at most ``limit`` bytes; those of an earlier call are replaced."""
    state.mkdir(parents=True, exist_ok=True)
    for old in state.glob(NAME.replace("{:02d}", "*")):
        old.unlink()
    written = []
    for number, files in enumerate(_batches(folder, limit)):
        path = state / NAME.format(number)
        with tarfile.open(path, "w") as packed:
            for file in files:
                packed.add(file, file.relative_to(folder))
        written.append(path)
    return written


def _batches(folder: Path, limit: int) -> Iterator[list[Path]]:
    """The files in groups that fit an archive each; locks and half-written files stay behind."""
    block = 1024  # of the header and the padding of a file
    group, size = list[Path](), END
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix in (".lock", ".partial"):
            continue
        own = file.stat().st_size + block
        if group and size + own > limit:
            yield group
            group, size = [], END
        group.append(file)
        size += own
    if group:
        yield group


def work(folder: Path, *, experiments: Sequence[str], workers: int, seconds: float, console: Console) -> int:
    """Let workers take up what is planned until the time is over; how many of them found nothing left to do."""
    environment = {**os.environ, "ETP_GRAPH_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-m", "benchmarks", "contest", "queue", "--out", str(folder / "runs"), "--experiments"]
    running = [
        subprocess.Popen([*words, *experiments], env=environment, start_new_session=True)  # noqa: S603 - this program
        for _ in range(workers)
    ]
    end = monotonic() + seconds
    try:
        while monotonic() < end and any(one.poll() is None for one in running):
            sleep(min(1.0, max(0.0, end - monotonic())))
    finally:
        finished = sum(one.poll() == 0 for one in running)
        for one in running:
            one.terminate()
        for one in running:
            try:
                one.wait(GRACE)
            except subprocess.TimeoutExpired:
                one.kill()
    console.print(f"{finished} of {workers} workers found nothing left to do", highlight=False)
    return finished


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=(__doc__ or "").splitlines()[0])
    names = [experiment.name for experiment in GPU_PLAN]
    parser.add_argument("--experiments", nargs="+", default=names, metavar="NAME", help=f"default {' '.join(names)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="default 9")
    parser.add_argument("--workers", type=int, default=6, metavar="N", help="runs at once on the GPU; default 6")
    parser.add_argument("--state", type=Path, required=True, metavar="FOLDER", help="of the archives, read and written")
    parser.add_argument("--folder", type=Path, help="to work in; default: one that is removed at the end")
    options: Any = parser.parse_args(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="etp-graph-gpu-") as temporary:
        folder = options.folder or Path(temporary)
        console.print(f"{unpack(options.state, folder)} archives unpacked", highlight=False)
        work(
            folder, experiments=options.experiments, workers=options.workers, seconds=60 * options.minutes,
            console=console,
        )  # fmt: skip
        for path in pack(folder, options.state):
            console.print(f"wrote {path}, {path.stat().st_size / 2**20:.1f} MiB", highlight=False)


if __name__ == "__main__":
    main()
