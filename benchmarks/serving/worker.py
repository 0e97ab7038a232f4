"""Run an exported folder in one engine, in a process that cannot import this library. Prints JSON.

``python -I worker.py FOLDER ENGINE TEXT PROMPTS TOKENS``: the file TEXT gives the prompts and the perplexity.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

WINDOW = 2048


def prompts_of(tokenizer: Any, text: str, number: int) -> list[list[int]]:
    """The first eight tokens of the first long lines."""
    lines = [line for line in text.splitlines() if len(line.split()) >= 8]
    return [tokenizer(line)["input_ids"][:8] for line in lines[:number]]


def perplexity(model: Any, tokens: Any) -> float:
    """exp of the mean loss of the first tokens of the text, in one window."""
    import torch

    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss.exp())


def continue_greedily(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """The tokens that follow a prompt, with the cache of keys and values."""
    import torch

    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip
    return [int(token) for token in found[0, len(prompt) :]]


def run_transformers(folder: Path, text: str, prompts: int, tokens: int) -> dict[str, Any]:
    """Load the folder with the stock class: perplexity, greedy tokens, and how fast they come."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    starts = prompts_of(tokenizer, text, prompts)
    continue_greedily(model, starts[0], 2)
    begin = time.perf_counter()
    found = [continue_greedily(model, start, tokens) for start in starts]
    seconds = time.perf_counter() - begin
    window = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :WINDOW]
    return {
        "class": type(model).__name__, "parameters": model.num_parameters(), "tokens": found,
        "tokens_per_second": prompts * tokens / seconds, "perplexity": perplexity(model, window),
        "version": transformers.__version__,
    }  # fmt: skip


def run_onnxruntime(folder: Path, text: str, prompts: int, tokens: int) -> dict[str, Any]:
    """Convert the stock model to ONNX, and run it without a cache: the next token after each prompt, and the logits."""
    import onnxruntime
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    starts = [torch.tensor([start]) for start in prompts_of(tokenizer, text, prompts)]
    file = folder.parent / "model.onnx"
    torch.onnx.export(model, (), kwargs={"input_ids": starts[0], "use_cache": False}, dynamo=True, verbose=False).save(
        file, external_data=True
    )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst = 0.0
    for start in starts:
        (logits,) = session.run(None, {session.get_inputs()[0].name: start.numpy()})
        with torch.no_grad():
            worst = max(worst, float((torch.from_numpy(logits) - model(start).logits).abs().max()))
    return {"class": "onnx", "logits_off_by": worst, "version": onnxruntime.__version__}


ENGINES = {"transformers": run_transformers, "onnxruntime": run_onnxruntime}


def main() -> None:
    """The command line."""
    sys.modules["etp_graph"] = None  # type: ignore[assignment]  # every import of it raises from here on
    folder, engine, text, prompts, tokens = sys.argv[1:]
    found = ENGINES[engine](Path(folder), Path(text).read_text(encoding="utf8")[:60_000], int(prompts), int(tokens))
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
