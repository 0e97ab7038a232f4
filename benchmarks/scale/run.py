"""What the force costs on many ranks: measured on 2 and 4, and modelled for 8 to 1,024 GPUs.

``python -m benchmarks scale`` measures seconds and bytes of a training step with and without the force under DDP and
FSDP2 on gloo, each setting in processes of its own, and writes ``benchmarks/results/scale.json`` and
``docs/results/scale.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, log2
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.processes import processor_record, run_apart
from benchmarks.scale.page import KINDS, measured_table, page

RESULTS = Path("benchmarks/results/scale.json")
SIZES, GPUS = (2, 4), tuple(2**k for k in range(3, 11))


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What connects the GPUs: bytes a second and seconds a message, and how fast a GPU reads its own memory.

    The defaults are data-sheet figures: 400 Gbit/s a GPU, 5 microseconds a message, 3 TB/s.
    """

    bandwidth: float = 50e9
    latency: float = 5e-6
    memory: float = 3e12


def reduced(n_bytes: float, ranks: int, network: Network) -> float:
    """Seconds of an all-reduce: each byte passes a link twice but for 1/n; a tree sends 2·log2(n) times in a row."""
    return 2 * (ranks - 1) / ranks * n_bytes / network.bandwidth + 2 * ceil(log2(ranks)) * network.latency


def modelled(kind: str, ranks: int, *, n_units: int, n_params: int, network: Network) -> dict[str, float]:
    """The force in one step of bf16 training with float32 master weights.

    Args:
        kind: ``"ddp"``: all weights are on every rank, and nothing is sent. ``"fsdp2"``: a share of 1/ranks of them.
        ranks: number of GPUs.
        n_units: number of units of the plan: twice so many float32 numbers are added up where gradients are looked at.
        n_params: number of parameters.
        network: see :class:`Network`.

    Returns:
        ``sent``: bytes of the force; ``training``: bytes that training itself hands to collectives (gradients in
        bf16; FSDP2 gathers the weights twice besides); ``seconds`` of the force: weights read three times and written
        once, gradients read once.
    """
    share = n_params / ranks if kind == "fsdp2" else n_params
    sent = 2 * 4 * n_units if kind == "fsdp2" else 0
    seconds = 5 * 4 * share / network.memory + (reduced(sent, ranks, network) if sent else 0.0)
    return {"sent": sent, "training": 2 * n_params * (3 if kind == "fsdp2" else 1), "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="for each measurement")
    parser.add_argument("--n-units", type=int, default=389_440, help="of the model that is modelled")
    parser.add_argument("--n-params", type=int, default=6_738_415_616, help="default: a Llama of 7B")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the measurements, as JSON")
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale.md"), help="the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(_one(**json.loads(options.one))) + "\n")
        return
    measured = {
        f"{kind}/{size}": run_apart(
            "scale", {"kind": kind, "size": size, "repetitions": options.repetitions},
            limit=options.limit_seconds, threads=1,
        )
        for kind in KINDS for size in SIZES
    }  # fmt: skip
    network, sizes = Network(), {"n_units": options.n_units, "n_params": options.n_params}
    model = {f"{kind}/{n}": modelled(kind, n, **sizes, network=network) for kind in KINDS for n in GPUS}
    body = {"conditions": processor_record(), "repetitions": options.repetitions, "network": asdict(network), **sizes,
            "measured": measured, "modelled": model}  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(body, indent=1) + "\n")
    options.out.write_text(page(body))
    sys.stdout.write(measured_table(measured) + "\n")


def _one(kind: str, size: int, repetitions: int) -> dict[str, Any]:
    from benchmarks.scale.probe import measure

    with TemporaryDirectory() as folder:
        return measure(kind, size, repetitions, Path(folder))
