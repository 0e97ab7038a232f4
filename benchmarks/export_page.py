"""The table of ``docs/export.md`` from the measurements; the text above it is written by hand and stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .export import TOLERANCE, passed
from .models import registry

MARK = "<!-- Everything below is made by python -m benchmarks.export. -->\n"
TITLES = {"export": "`torch.export`", "compile": "`torch.compile`", "onnx": "ONNX", "inductor": "inductor"}
_HEAD = """
## Which models

Made by `python -m benchmarks.export`; the numbers are in `benchmarks/results/export.json`. It lists {listed} of the
registry's {known} models. Each is the real class of its library with random weights, pruned by 40 % of its units on
average, of all kinds. A number is the largest difference from the pruned model in eager mode over its largest output;
up to {tolerance:.0e} passes. *Dense neither* means that the model as its library made it cannot go there, with what the
exporter said of the pruned one. *Pruned only* would be a failure of this library.

"""


def write_page(body: dict[str, Any], path: Path) -> None:
    """Replace the table of the page; a page that does not exist begins with it."""
    before = path.read_text(encoding="utf8").partition(MARK)[0] if path.exists() else "# Export"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before.rstrip()}\n\n{MARK}{_tables(body)}", encoding="utf8")


def _tables(body: dict[str, Any]) -> str:
    found: dict[str, Any] = body["measurements"]
    ways = [way for way in TITLES if any(key.split("/")[-2] == way for key in found)]
    families: dict[str, list[str]] = {}
    for name, entry in registry().items():
        if any(f"{name}/{way}/pruned" in found for way in ways):
            families.setdefault(entry.family, []).append(name)
    text = _HEAD.format(listed=sum(map(len, families.values())), known=len(registry()), tolerance=TOLERANCE)
    for family, names in families.items():
        rows = [[name, *(cell(found, name, way) for way in ways)] for name in names]
        lines = [["model", *(TITLES[way] for way in ways)], ["---"] * (1 + len(ways)), *rows]
        text += f"### {family}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    made = ", ".join(f"{key} {value}" for key, value in body["conditions"].items())
    return text + f"Measured with {made}.\n"


def cell(found: dict[str, Any], name: str, way: str) -> str:
    """What the table says of one model and where it goes."""
    pruned, dense = found.get(f"{name}/{way}/pruned"), found.get(f"{name}/{way}/dense")
    if pruned is None:
        return "-"
    if passed(pruned):
        return f"{pruned['error']:.0e}"
    why = str(pruned.get("verdict", f"differs by {pruned.get('error', float('nan')):.0e}"))
    why = why.removeprefix("exception: ").replace("|", "/").replace("<", "&lt;")[:80]
    return f"pruned only: {why}" if dense is not None and passed(dense) else f"dense neither: {why}"
