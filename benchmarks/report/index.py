"""Write the list of all records, and the archive of short runs."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.report import comparison
from benchmarks.report.comparison import Pages

MORE = {
    "coverage": ("Coverage", "checks the plan of each model of the registry, beside plain Torch-Pruning"),
    "coverage-sweep": ("Coverage of models that nobody chose", "checks the default call on models that libraries list"),
    "graph-sources": ("Two sources of plans", "compares the plans of labels with those of Torch-Pruning's graph"),
    "speed": ("Speed", "measures the cost of the force, of plans, of budgets and of surgery"),
    "check-cost": ("Cost of the check", "measures `trace` and `verify` in forwards of the dense model"),
    "latency": ("Latency", "compares the speed-up in multiply-adds with that in time, and checks budgets in time"),
    "scale": ("Scale", "measures what the force sends and costs on several ranks, and models it for up to 1,024 GPUs"),
    "export": ("Export", "exports pruned models with `torch.export`, `torch.compile` and ONNX"),
    "families": ("Families that load what was exported", "loads pruned models with the stock classes of transformers"),
    "serving": ("A served language model", "runs a pruned SmolLM2 in engines without this library"),
    "encoder": ("A served sentence encoder", "runs a pruned MiniLM in sentence-transformers and ONNX Runtime"),
    "study": (
        "The study on short schedules",
        "compares `etp-global` with variants of it that differ in one thing each",
    ),
    "study-full": ("The study at full size", "asks on validation parts what the default of `etp` should be"),
    "paper-figures": ("The papers' figures", "trains a VGG-19 under the forces of the papers"),
    "llm": ("A language model without training", "compares methods that prune SmolLM2-135M without training it"),
    "llm-recovery": ("A language model with a few minutes of training", "trains the pruned SmolLM2 in four ways"),
    "oneshot": ("Networks without training", "compares methods on a ResNet-56, a BERT and a GAT"),
    "llm-streamed": ("A language model that is not loaded", "measures memory and time of `etp.oneshot` on folders"),
    "gradual": ("Single weights or whole units", "compares masks on weights, removed units and a narrow network"),
}
"""Title and contents of the records that are not of one task."""


_OVERVIEW = (
    "*After fine-tuning, at the highest speed-up of each task, the best above; mean and standard deviation over the "
    "seeds. Hollow: controls; `dense`, dashed, is never cut and takes as many steps. Dotted: the checkpoint.*"
)


def index(pages: Pages, more: Iterable[str] = ()) -> str:
    """The list of all records with one sentence each.

    Args:
        pages: records at full size by the name of their page.
        more: names of further pages.
    """
    return "\n".join([
        "# Results", "",
        "This page lists the records of measurements. Each begins with its command, its findings and its limits; "
        "tables follow.", "",
        "- [Evidence](evidence.md) asks what the exponential force brings, and compares `etp` with other methods at "
        "full size. Begin here.",
        "- [Beside the papers](papers.md) puts every row of the papers' tables beside the run that comes closest.",
        "- [The protocol](../benchmarks.md) has the rules of the comparison.", "",
        "## Methods that train, at full size", "", *_listed(pages), "",
        "## Other records", "", *(f"- [{MORE[name][0]}]({name}.md) {MORE[name][1]}." for name in more),
        "- [Archive](archive.md) has comparisons on short schedules, which support no claim.", "",
    ])  # fmt: skip


def archive(pages: Pages, figure: str | None = None) -> str:
    """The page on short runs, which were made to choose among variants.

    Args:
        pages: records at other scales by the name of their page.
        figure: file of the overview.
    """
    return "\n".join([
        "# Archive: short schedules", "",
        "These records use parts of the data, narrower networks and minutes of training. They were made to choose "
        "among variants. Where the unpruned control loses much, they measure how methods get on with a network that is "
        "being damaged, and support no claim. [Evidence](evidence.md) has the runs at full size. They are from before "
        "`etp` took the same share of every group; what it was then is called `etp-global` here.", "",
        *comparison.harmed(pages), *comparison.verdicts(pages), "- Fewer than three seeds give no verdict.", "",
        *_listed(pages), "",
        *([f"![All methods on every task]({figure})", "", _OVERVIEW, ""] if figure else []),
        comparison.TABLE, "", *comparison.table(pages), "",
    ])  # fmt: skip


def _listed(pages: Pages) -> list[str]:
    return [f"- [{records[0]['title']}]({name}.md) {comparison.contents(records)}." for name, records in pages.items()]
