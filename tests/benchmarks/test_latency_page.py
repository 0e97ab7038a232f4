"""The page of the latency benchmark: rows of what was measured, verdicts, and what gave no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.latency.page import budgets, table, write_page
from benchmarks.latency.run import Setting

FIT = {"target_ms": 10.0, "predicted_ms": 10.2, "measured_ms": 9.8, "dense_ms": 20.0, "iterations": 2, "round_to": 16}
FOUND: dict[str, Any] = {
    "ResNet-50/1": {
        "dense": {"p50_ms": 20.0}, "seconds": 1.0, "warnings": ["it was late"],
        "rows": [{"budget": "speed_up=2.0", "macs": 2.0, "p50_ms": 11.0, "fit": None},
                 {"budget": "speed_up=4.0", "macs": 4.0, "p50_ms": 10.0, "fit": None},
                 {"budget": "speed_up_latency=2.0", "macs": 2.5, "p50_ms": 10.0, "fit": FIT}],
    },
    "ViT-B/16/1": {"verdict": "no answer in 9 s", "seconds": 9.0},
}  # fmt: skip


def test_rows_say_whether_macs_and_time_agree() -> None:
    lines = table(FOUND).splitlines()[2:]
    assert lines[0] == "| ResNet-50 | 1 | `speed_up=2.0` | 11.00 of 20.00 ms | 2.00x | 1.82x | agrees |"
    assert "**diverges**" in lines[1]
    assert "ViT-B/16 | 1 | no answer in 9 s" in lines[3]


def test_budgets_in_time_are_shares_of_the_dense_one() -> None:
    assert budgets(FOUND).splitlines()[2:] == ["| ResNet-50 | 1 | 50% | 51% | 49% | 50% | 2 | 16 |"]


def test_the_page(tmp_path: Path) -> None:
    body = {
        "conditions": {"cpu": "a chip", "cores": "2", "torch": "2"}, "repetitions": 9, "small": True,
        "measurements": FOUND,
    }  # fmt: skip
    write_page(body, tmp_path / "results" / "latency.md")
    text = (tmp_path / "results" / "latency.md").read_text()
    assert "a chip" in text
    assert "`python -m benchmarks latency --threads 1`" in text
    assert "- ResNet-50: it was late" in text
    assert "these figures say nothing" in text
    assert "differ by more than 25 % in 1 of 3 rows. They belong to ResNet-50." in text
    assert "that of ResNet-50: 4.00x in multiply-adds, 2.00x in time." in text
    assert "- Without a result: ViT-B/16 with 1 threads (no answer in 9 s)." in text


def test_a_setting_has_a_key_of_its_own() -> None:
    assert Setting(model="ViT-B/16", threads=2, repetitions=1).key == "ViT-B/16/2"
