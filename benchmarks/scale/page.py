"""Write ``docs/results/scale.md`` from what :mod:`benchmarks.scale.run` found."""

from __future__ import annotations

from typing import Any

from benchmarks.common.records import with_new_names

KINDS = ("ddp", "fsdp2")


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
    """Return the page, a pure function of the results."""
    network, measured, model = body["network"], body["measured"], body["modelled"]
    machine = with_new_names(body["conditions"])
    lines = [
        "# Scale", "",
        "This record measures the cost of the force on 2 and 4 ranks, in seconds and in bytes sent, and models it for "
        "8 to 1,024 GPUs. Larger numbers of ranks are modelled because "
        "the measurements ran on one machine.", "",
        "- Measure: `python -m benchmarks scale`.",
        "- Results: `benchmarks/results/scale.json`.",
        "- Write the page again without measuring: `python -m benchmarks report`.",
        f"- Machine: {machine['device']}, {machine['cpus']} cores; gloo, one thread for each rank.",
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
