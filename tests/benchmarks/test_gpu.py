"""Runs on a preemptible GPU: what is packed goes on, and the step is measured on any device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.common.records import read_records
from benchmarks.gpu import run, step
from benchmarks.queue.plan import GPU_PLAN, PLAN, chosen

QUIET = Console(quiet=True)


def test_what_is_packed_is_there_again(tmp_path: Path) -> None:
    folder, state = tmp_path / "work", tmp_path / "state"
    for name, size in (("runs/a.jsonl", 10), ("cache/b.safetensors", 3_000), ("cache/states/r/01.pt", 9_000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes([size % 251]) * size)
    (folder / "runs/.locks").mkdir()
    (folder / "runs/.locks/x.lock").write_text("1")
    written = run.pack(folder, state, limit=22_000)
    assert len(written) == 2  # 3 kB and 9 kB do not fit one of 22 kB beside the 10 kB of its end
    again = tmp_path / "again"
    assert run.unpack(state, again) == 2
    there = {file.relative_to(again): file.read_bytes() for file in again.rglob("*") if file.is_file()}
    assert there == {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"
    }  # fmt: skip
    (folder / "cache/states/r/01.pt").unlink()  # the run has its line: an archive of before must not bring it back
    run.pack(folder, state, limit=22_000)
    assert run.unpack(state, tmp_path / "third") == 1
    assert not (tmp_path / "third/cache/states/r/01.pt").exists()


def test_workers_share_a_folder_and_are_stopped_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "worker.py"
    stub.write_text(
        "import os, sys, time, pathlib\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]); out.mkdir(parents=True, exist_ok=True)\n"
        "(out / f'{os.getpid()}.jsonl').write_text(os.environ['ETP_GRAPH_CACHE'] + ' '.join(sys.argv))\n"
        "time.sleep(0 if 'quick' in sys.argv else 600)\n"
    )
    start = run.subprocess.Popen

    def popen(words: list[str], **options: object) -> object:
        return start([sys.executable, str(stub), *words[3:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(run.subprocess, "Popen", popen)
    assert run.work(tmp_path / "a", experiments=["quick"], workers=2, seconds=60, console=QUIET) == 2
    texts = [file.read_text() for file in (tmp_path / "a/runs").glob("*.jsonl")]
    assert len(texts) == 2 and all("a/cache" in text and "contest queue" in text for text in texts)
    assert run.work(tmp_path / "b", experiments=["long"], workers=2, seconds=2, console=QUIET) == 0


def test_only_who_names_them_gets_the_runs_for_a_gpu() -> None:
    assert not {one.name for one in chosen(None, None)} & {one.name for one in GPU_PLAN}
    assert [one.name for one in chosen(["P1", "E1"], None)] == ["E1", "P1"]
    assert {one.scale for one in GPU_PLAN} == {"paper"}
    assert len({one.name for one in (*PLAN, *GPU_PLAN)}) == len(PLAN) + len(GPU_PLAN)


def test_the_cost_of_a_step_is_measured_on_any_device(tmp_path: Path) -> None:
    step.main(["--depth", "8", "--batch", "4", "--repetitions", "2", "--results", str(tmp_path / "r.jsonl")])
    (line,) = read_records(tmp_path / "r.jsonl")
    assert set(line["added"]) == set(step.METHODS)
    assert all(seconds > 0 for seconds in line["seconds"].values())
    on_gpu = step.torch.cuda.is_available()
    assert all((found is not None) == on_gpu for kind in ("waits", "graph") for found in line[kind].values())
