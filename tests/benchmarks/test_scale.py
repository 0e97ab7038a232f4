"""The model behind the page on scale, and one measurement of it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks.scale.page import measured_table, page
from benchmarks.scale.run import GPUS, Network, modelled, reduced

SIZES = {"n_units": 1000, "n_params": 10**9}


def test_the_force_sends_nothing_under_ddp_and_less_than_training_under_fsdp() -> None:
    for ranks in GPUS:
        ddp, fsdp = (modelled(kind, ranks, **SIZES, network=Network()) for kind in ("ddp", "fsdp2"))
        assert ddp["sent"] == 0
        assert fsdp["sent"] == 8000
        assert fsdp["seconds"] < ddp["seconds"]
        assert fsdp["sent"] < 1e-5 * fsdp["training"]


def test_an_all_reduce_is_bounded_by_bandwidth_and_by_latency() -> None:
    assert reduced(1e9, 2, Network(bandwidth=1e9, latency=0)) == pytest.approx(1)
    assert reduced(0, 1024, Network(latency=1)) == 20


def test_the_page_says_what_was_measured_and_what_was_not() -> None:
    row = {"plain_seconds": 0.01, "force_seconds": 0.012, "plain_bytes": 5000, "force_bytes": 9000}
    measured = {"fsdp2/2": row, "ddp/4": {"verdict": "no answer in 3 s"}}
    assert "| fsdp2/2 | 10.00 | 12.00 | 5,000 | 4,000 |" in measured_table(measured)
    body = {"conditions": {"cpu": "a", "cores": "2"}, "repetitions": 3, "measured": measured, **SIZES,
            "network": {"bandwidth": 5e10, "latency": 5e-6, "memory": 3e12},
            "modelled": {"fsdp2/8": modelled("fsdp2", 8, **SIZES, network=Network())}}  # fmt: skip
    text = page(body)
    assert "Not measured." in text
    assert "- ddp on 4 ranks: no answer in 3 s." in text
    assert "fsdp2 on 2 ranks: the force makes a step 20% longer and sends 4,000 bytes (80.00% of those of" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_bytes_of_the_force_are_eight_for_each_unit_or_none(kind: str, tmp_path: Path) -> None:
    from benchmarks.scale.probe import measure

    found = measure(kind, 2, 2, tmp_path)
    assert found["force_bytes"] - found["plain_bytes"] == (0 if kind == "ddp" else 8 * found["n_units"])
    assert found["plain_bytes"] >= 4 * found["n_params"]
