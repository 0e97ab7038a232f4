"""What the force costs on many ranks: measured on 2 and 4, and modelled for 8 to 1,024 GPUs.

``python -m benchmarks scale`` measures seconds and bytes of a training step with and without the force under DDP and
FSDP2 on gloo, each setting in processes of its own, and writes ``benchmarks/results/scale.json`` and
``docs/results/scale.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
@@from dataclasses import asdict, dataclass
from math import ceil, log2
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.processes import conditions, run_apart

RESULTS = Path("benchmarks/results/scale.json")
KINDS, SIZES, GPUS = ("ddp", "fsdp2"), (2, 4), tuple(2**k for k in range(3, 11))


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
    body = {"conditions": conditions(), "repetitions": options.repetitions, "network": asdict(network), **sizes,
            "measured": measured, "modelled": model}  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(body, indent=1) + "\n")
    options.out.write_text(page(body))
    sys.stdout.write(measured_table(measured) + "\n")


def _one(kind: str, size: int, repetitions: int) -> dict[str, Any]:
    from benchmarks.scale.probe import measure

    with TemporaryDirectory() as folder:
        return measure(kind, size, repetitions, Path(folder))


def measured_table(measured: dict[str, Any]) -> str:
    """Seconds and bytes of a step with and without the force, as Markdown."""
    rows = ["| ranks | ms without | ms with | bytes without | bytes of the force |", "|---|---|---|---|---|"]
    for key, row in measured.items():
        if "verdict" in row:
            rows.append(f"| {key} | {row['verdict']} | | | |")
            continue
        plain, force = (1e3 * row[f"{name}_seconds"] for name in ("plain", "force"))
        extra = row["force_bytes"] - row["plain_bytes"]
        rows.append(f"| {key} | {plain:.2f} | {force:.2f} | {row['plain_bytes']:,} | {extra:,} |")
    return "\n".join(rows)


def page(body: dict[str, Any]) -> str:
    """The page, a pure function of the results."""
    network, measured, model = body["network"], body["measured"], body["modelled"]
    lines = [
        "# Scale", "",
        "This record measures the cost of the force on 2 and 4 ranks, in seconds and in bytes sent, and models it for "
        "8 to 1,024 GPUs. Larger numbers of ranks are modelled because "
        "the measurements ran on one machine.", "",
        "- Measure: `python -m benchmarks scale`.",
        "- Results: `benchmarks/results/scale.json`.",
        "- Write the page again without measuring: `python -m benchmarks report`.",
        f"- Machine: {body['conditions']['cpu']}, {body['conditions']['cores']} cores; gloo, one thread for each rank.",
        "", "## Findings", "", *_findings(measured, model), "",
        "## Limits", "",
        "- All ranks run on one machine. The seconds are those of its cores, not of a network.",
        "- Figures for 8 and more GPUs come from a formula with data-sheet figures. They were not measured.", "",
        "## Measured", "",
        f"Medians of {body['repetitions']} steps in turns, without a force and with that of `etp`. Here the force "
        "reads the gradients at every step; in longer phases it reads them every few steps. Bytes are those that a "
        "rank hands to collectives in one step.", "",
        measured_table(measured), "", "## Modelled", "",
        f"Not measured. Assumptions: {body['n_params']:,} parameters, {body['n_units']:,} units, "
        f"{network['bandwidth'] / 1e9:.0f} GB/s and {network['latency'] * 1e6:.0f} us a message between GPUs, "
        f"{network['memory'] / 1e12:.0f} TB/s inside. In the modelled step the force reads its share of weights and "
        "gradients, adds up two numbers for each unit (FSDP2 only), and reads and writes its share once more.", "",
        "| GPUs | force, bytes | training, bytes | share | force, ms |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for key, row in model.items():
        share = row["sent"] / row["training"]
        lines.append(
            f"| {key} | {row['sent']:,.0f} | {row['training']:,.0f} | {share:.1e} | {1e3 * row['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _findings(measured: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Sentences that follow from the figures alone."""
    lines = []
    for key, row in measured.items():
        kind, ranks = key.split("/")
        if "verdict" in row:
            lines.append(f"- {kind} on {ranks} ranks: {row['verdict']}.")
            continue
        longer = row["force_seconds"] / row["plain_seconds"] - 1
        extra = row["force_bytes"] - row["plain_bytes"]
        sent = f"{extra:,} bytes ({extra / row['plain_bytes']:.2%} of those of training)" if extra else "no bytes"
        lines.append(
            f"- Measured, {kind} on {ranks} ranks: the force makes a step {longer:.0%} longer and sends {sent}."
        )
    for kind in KINDS:
        own = [(key, row) for key, row in model.items() if key.startswith(f"{kind}/")]
        if own:
            (first, start), (last, end) = own[0], own[-1]
            lines.append(
                f"- Modelled, {kind}: the force takes {1e3 * start['seconds']:.2f} ms of a step on "
                f"{first.partition('/')[2]} GPUs and {1e3 * end['seconds']:.2f} ms on {last.partition('/')[2]}."
            )
    return lines
