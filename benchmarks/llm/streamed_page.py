"""The page on pruning a folder block by block."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.markdown import as_row
from benchmarks.common.records import Record

HEAD = """# A language model that is not loaded

`etp.oneshot` prunes a Llama with random bfloat16 weights from a folder to a folder: calibration, selection,
compensation by least squares, and a check of each block. The model is not loaded. Blocks compute in float32.

- Measure: `python -m benchmarks llm-streamed` (one thread; a run that has a line is not repeated).
- Results: `benchmarks/results/llm-streamed.jsonl`.

"""

NOTES = """
- *Peak* is `ru_maxrss` of the process that prunes, with Python, PyTorch and what they share with other processes. After
  the imports it is *imported*.
- *Folder*: the safetensors files of the dense and of the pruned model.
- Minutes are of a clock. Other processes ran on the same two cores meanwhile, so an idle machine takes less.
- There are fewer tokens than inputs of the widest layers, whose least squares the ridge decides. More tokens take more
  time and disk, and the same memory.
- The weights are random, so the page says nothing about quality. [A trained model](llm.md) has such figures.

## What takes the time

"""

SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
"""Shape of Llama-2-7B, whose layers have four projections of equal width (32 heads of keys and values)."""

ESTIMATE = """
## 7 B parameters, estimated

Not measured. A layer of Llama-2-7B has {block:.1f} times the parameters of a layer here, and there are {layers} of
them. Running the layers grows with the parameters of a layer. Least squares grows with the square of the inputs of a
layer where moments are summed, and with their cube where it solves: between {square:.1f} and {cube:.1f} times. With as
many tokens as in the first row, this is {least:.1f} to {most:.1f} hours on one thread of this machine. The memory above
that of the imports grows with the largest layer, {block:.1f} times: about {peak:.1f} GiB. The folder has 13.5 GB.
"""


def page(records: Sequence[Record]) -> str:
    """The page, from all lines."""
    if not records:
        return HEAD + "No runs yet.\n"
    table = [as_row(("parameters", "criterion", "tokens", "folder, GB", "peak, GiB", "imported, GiB", "minutes"))]
    table.append("|---|---|---:|---:|---:|---:|---:|")
    phases = list(dict.fromkeys(name for one in records for name in one["phases"]))
    parts = [as_row(("criterion", *(f"{name}, s" for name in phases))), "|---|" + "---:|" * len(phases)]
    for one in records:
        dense, pruned = (f"{number / 1e9:.2f} B" for number in one["params"])
        size = " to ".join(f"{n_bytes / 1e9:.2f}" for n_bytes in one["bytes"])
        name = f"`{one['config']['criterion']}`"
        table.append(as_row((
            f"{dense} to {pruned}", name, f"{one['tokens']:,}", size, f"{one['peak_gib']:.2f}",
            f"{one['imported_gib']:.2f}", f"{one['seconds'] / 60:.0f}",
        )))  # fmt: skip
        parts.append(as_row((name, *(f"{one['phases'].get(phase, 0):.0f}" for phase in phases))))
    return HEAD + "\n".join(table) + "\n" + NOTES + "\n".join(parts) + "\n" + _PHASES + _estimate(records[0])


_PHASES = """
- *embed*: hidden states before the first block. *forward*, *head* and *observe*: the pass forward, the loss, and the
  pass backward that records the criterion; a criterion that reads no gradients has *observe* alone, forward.
- *write*: a block runs again, is compensated, cut, compared with the block in which the removed units are zero, and
  written. *rest*: embeddings, head and the files of the tokenizer are copied.
"""


def _block(shape: dict[str, int]) -> int:
    """Parameters of a layer of Llama, without its norms."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = shape.get("num_attention_heads", 1)
    return width * width * 2 + 2 * width * width * shape.get("num_key_value_heads", heads) // heads + 3 * width * inner


def _estimate(one: Record) -> str:
    shape, spent = one["shape"], one["phases"]
    block, layers = _block(SEVEN) / _block(shape), SEVEN["num_hidden_layers"] / shape["num_hidden_layers"]
    wider = SEVEN["intermediate_size"] / shape["intermediate_size"]
    running = sum(spent.get(name, 0.0) for name in ("forward", "head", "observe")) * block
    least, most = ((running + spent["write"] * wider**power) * layers / 3600 for power in (2, 3))
    peak = one["imported_gib"] + (one["peak_gib"] - one["imported_gib"]) * block
    return ESTIMATE.format(
        block=block,
        layers=SEVEN["num_hidden_layers"],
        square=wider**2,
        cube=wider**3,
        least=least,
        most=most,
        peak=peak,
    )
