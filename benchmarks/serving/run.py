"""Prune SmolLM2-135M-Instruct without training, export it, and run it in engines without this library.

``python -m benchmarks serving`` calibrates on windows of the training text of the Penn Treebank. It prunes to shares of
the parameters: heads and neurons with equally wide layers and compensation, whole layers, or both. It exports plain
folders, and runs each in processes that cannot import this library. The perplexity is that of the first 2,048 tokens of
the test text. Each folder and engine is one JSON line; a run that has a line without an error is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import machine_conditions
from benchmarks.common.records import Record, append_record, read_records
from benchmarks.models.smollm2 import cache_folder
from benchmarks.serving import worker
from benchmarks.serving.folders import DENSE, WAYS, Folders, Setting, differences, settings
from benchmarks.serving.page import PAGE, RESULTS, page
from etp_graph.demo.zoo.data import data_root

ALONE = ("vllm",)
"""Engines that hold one model in a process, so that it is not timed in turns with the dense one."""


def run_engine(task: worker.Task, python: str = sys.executable) -> dict[str, Any]:
    """What an engine answers; ``error`` if it fails."""
    done = subprocess.run(  # noqa: S603  # our own script
        [python, "-I", worker.__file__], input=json.dumps(asdict(task)), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(folders: Folders, setting: Setting, engine: str, text: Path, options: argparse.Namespace) -> Record:
    """The record of one folder in one engine, in turns with the dense model."""
    names = [setting] if setting.way == DENSE else [Setting(share=1.0, way=DENSE), setting]
    places = [folders.make(one) for one in names]
    loaded = places[-1:] if engine in ALONE else places
    task = worker.Task(
        engine=engine, folders=[str(place) for place in loaded], text=str(text), prompts=options.prompts,
        tokens=options.tokens, rounds=options.rounds, timed=options.timed, llama_cpp=options.llama_cpp,
        sites=[str(Path(site).resolve()) for site in options.site],
    )  # fmt: skip
    found = run_engine(task, options.vllm_python if engine == "vllm" else sys.executable)
    if "tokens" in found:
        found["differences"] = differences(places[-1], found.pop("tokens"))
    config = json.loads((places[-1] / "config.json").read_text(encoding="utf8"))
    sizes = {name: config[name] for name in ("num_hidden_layers", "intermediate_size", "num_attention_heads")}
    return {
        "setting": asdict(setting), "engine": engine, **sizes, **found, "conditions": machine_conditions(),
        **{name: getattr(options, name) for name in ("prompts", "tokens", "rounds", "timed")},
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.8, 0.6], help="of the parameters")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="what is removed")
    parser.add_argument("--engines", nargs="*", default=list(worker.ENGINES), choices=list(worker.ENGINES))
    parser.add_argument("--site", nargs="*", default=[], help="folders of pip install --target with engines")
    parser.add_argument("--llama-cpp", default="", help="folder of the sources of llama.cpp, for its converter")
    parser.add_argument("--vllm-python", default=sys.executable, help="Python of an environment with vLLM")
    parser.add_argument("--work", type=Path, default=None, help="where folders stay; default: in the cache")
    parser.add_argument("--round-to", type=int, default=32, help="neurons are a multiple of this")
    parser.add_argument("--prompts", type=int, default=20, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="turns that are timed")
    parser.add_argument("--timed", type=int, default=8, help="tokens after each prompt in a turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON lines")
    parser.add_argument("--page", action="store_true", help="write the page from the records, without measuring")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    if not options.page:
        torch.set_num_threads(1)
        text = data_root() / "ptb" / "ptb.test.txt"
        folders = Folders(
            options.work or cache_folder().with_name("serving"), text.read_text(encoding="utf8")[:60_000],
            prompts=options.prompts, tokens=options.tokens, round_to=options.round_to,
        )  # fmt: skip
        have = [(one["setting"], one["engine"]) for one in read_records(options.results) if "error" not in one]
        for engine in options.engines:
            for setting in settings(options.shares, options.ways):
                if (asdict(setting), engine) not in have:
                    record = measure(folders, setting, engine, text, options)
                    append_record(options.results, record)
                    sys.stdout.write(json.dumps(record) + "\n")
                    sys.stdout.flush()
    PAGE.write_text(page(read_records(options.results)), encoding="utf8")


if __name__ == "__main__":
    main()
