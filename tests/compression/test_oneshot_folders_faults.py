"""A streamed run that is killed or meets a full disk goes on to the same bits; bad input leaves nothing behind."""

from __future__ import annotations

import errno
import json
import multiprocessing as mp
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import etp_graph as etp
from etp_graph.compression.streamed import _state
from etp_graph.errors import BudgetError, CheckpointError, EtpError, ExportError, PlanError, ScoreError
from tests.support.models.causal_models import token_batches, write_causal

transformers = pytest.importorskip("transformers")

BUDGETS = [0.9, 0.8]


def prune(source: Path, out: Path, **options: Any) -> etp.StreamedResult:
    given: dict[str, Any] = {"budget": BUDGETS, "criterion": "wanda", "progress": False, **options}
    return etp.oneshot(source, given.pop("batches", None) or batches(), out=out, **given)


def batches() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return token_batches()


def bits(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def count_moments(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[int]:
    """Call ``act`` with the number of the moment before and after each change of a file."""
    seen = [0]

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for step in (lambda: None, lambda: function(*args, **kwargs)):
                found = step()
                seen[0] += 1
                act(seen[0])
            return found

        return call

    for owner, name in (
        (_state, "save_file"), (_state, "replace_file"), (_state, "move_into_place"), (shutil, "rmtree"),
        (Path, "unlink"), (Path, "replace"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    return seen


def killed(source: Path, out: Path, moment: int, criterion: str) -> None:
    """Prune, and end by SIGKILL at a moment; what a process of its own does."""
    with pytest.MonkeyPatch.context() as patch:
        count_moments(patch, lambda now: os.kill(os.getpid(), signal.SIGKILL) if now == moment else None)
        prune(source, out, criterion=criterion)


@pytest.mark.skipif("fork" not in mp.get_all_start_methods(), reason="processes that share what was imported")
@pytest.mark.parametrize("criterion", ["wanda", "fisher"])
def test_a_killed_run_continues_to_the_same_bits(
    criterion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_causal(tmp_path / "dense")
    with monkeypatch.context() as patch:
        seen = count_moments(patch, lambda now: None)
        prune(source, tmp_path / "whole", criterion=criterion)
    expected, context = bits(tmp_path / "whole"), mp.get_context("fork")
    assert expected
    for moment in range(1, seen[0] + 1, max(1, seen[0] // 6)):
        out = tmp_path / f"out-{moment}"
        process = context.Process(target=killed, args=(source, out, moment, criterion))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        prune(source, out, criterion=criterion, overwrite=True)
        assert bits(out) == expected, f"killed at {moment}"
        assert not [file for file in tmp_path.glob(f".{out.name}*") if file.is_dir()]


def test_steps_that_are_finished_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, stop = write_causal(tmp_path / "dense"), RuntimeError("stop")

    def fail(self: Any) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr("etp_graph.compression.streamed._write.Writer._write_rest", fail)
        with pytest.raises(RuntimeError, match="stop"):
            prune(source, tmp_path / "out")
    assert list(prune(source, tmp_path / "out").seconds) == ["rest"]


def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, save = write_causal(tmp_path / "dense"), _state.save_file
    prune(source, tmp_path / "whole")

    def full(tensors: Any, file: Path, **rest: Any) -> None:
        if "size-1" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(_state, "save_file", full)
        with pytest.raises(CheckpointError, match=r"No space left.*it continues"):
            prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prune(source, tmp_path / "out")
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_causal(tmp_path / "dense")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="are free"):
        prune(source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def stopped(source: Path, out: Path) -> Path:
    """The state of a run that was stopped before the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("etp_graph.compression.streamed._write.Writer._write_rest", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(source, out)
    return out.with_name(f".{out.name}.oneshot")


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    source = write_causal(tmp_path / "dense")
    state = stopped(source, tmp_path / "out")
    before = bits(state)
    with pytest.raises(CheckpointError, match=r"other arguments.*criterion was 'wanda', is 'flap'"):
        prune(source, tmp_path / "out", criterion="flap")
    torch.manual_seed(2)
    with pytest.raises(CheckpointError, match=r"other arguments.*batches"):
        prune(source, tmp_path / "out", batches=token_batches())
    assert bits(state) == before


def test_a_folder_with_the_name_of_the_state_is_not_removed(tmp_path: Path) -> None:
    source, other = write_causal(tmp_path / "dense"), tmp_path / ".out.oneshot" / "mine"
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(CheckpointError, match="holds 'mine', but no run"):
        prune(source, tmp_path / "out")
    assert other.read_text() == "mine"


@pytest.mark.parametrize("file", ["journal.json", "scores-001.safetensors", "size-0/model-00001-of-00005.safetensors"])
def test_damaged_state_is_refused(file: str, tmp_path: Path) -> None:
    source = write_causal(tmp_path / "dense")
    damaged = stopped(source, tmp_path / "out") / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"emove .*to begin anew"):
        prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batches": iter(())}, ScoreError, "batches is empty"),
        ({"batches": [torch.full((1, 8), 64)]}, ScoreError, "batch 1: token 64 is not in the vocabulary of 64"),
        ({"batches": [torch.zeros(1, 4)]}, ScoreError, "batch 1: expected input_ids"),
        ({"batches": [{"pixels": torch.zeros(1)}]}, ScoreError, "batch 1: LlamaForCausalLM does not take it"),
        ({"budget": [0.8, 0.9]}, BudgetError, "order them from large to small"),
        ({"budget": []}, BudgetError, "give different budgets"),
        ({"budget": 0.1}, BudgetError, "out of reach"),
        ({"budget": etp.Budget(latency_ms=1)}, BudgetError, "measured"),
        ({"criterion": "nothing"}, ScoreError, "nothing"),
        ({"prune": "stream"}, PlanError, "no group can be removed block by block"),
        ({"ridge": -1.0}, EtpError, "ridge"),
    ],
)  # fmt: skip
def test_bad_arguments_leave_no_output(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    source = write_causal(tmp_path / "dense")
    if "batches" in options and not isinstance(options["batches"], list):
        with pytest.raises(error, match=words):
            etp.oneshot(source, options["batches"], budget=0.8, out=tmp_path / "out", progress=False)
    else:
        with pytest.raises(error, match=words):
            prune(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite_name_the_block(tmp_path: Path) -> None:
    source = write_causal(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ScoreError, match=r"batch 1: model\.layers\.1 returns NaN or infinite values"):
        prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edited_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def without(*keys: str, **more: torch.Tensor) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in keys} | more
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot be read as JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors files"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapters"),
        (edited_config(auto_map={"AutoModel": "x.y"}), "code of its own"),
        (edited_config(quantization_config={"bits": 4}), "quantized"),
        (edited_config(architectures=["Nothing"]), "does not know the model"),
        (without("model.layers.1.mlp.up_proj.weight"), "lacks 'model.layers.1.mlp.up_proj.weight'"),
        (without(other=torch.zeros(3)), "also holds 'other'"),
        (edited_config(intermediate_size=40), "has shape"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_such_model_is_refused(edit: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    source = write_causal(tmp_path / "dense")
    edit(source)
    with pytest.raises(CheckpointError, match=words):
        prune(source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_in_use_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    source = write_causal(tmp_path / "dense")
    write_causal(tmp_path / "out", "qwen2")
    with pytest.raises(ExportError, match="overwrite=True"):
        prune(source, tmp_path / "out", budget=0.8)
    assert not list(tmp_path.glob(".*"))
    prune(source, tmp_path / "out", budget=0.8, overwrite=True)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"


def test_models_whose_blocks_cannot_run_alone_are_refused(tmp_path: Path) -> None:
    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=64)
    gemma = transformers.Gemma3nTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, vocab_size_per_layer_input=64, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    transformers.Gemma3nForCausalLM(gemma).save_pretrained(tmp_path / "gemma")
    for name, words in (("t5", "is no decoder with one list"), ("gemma", "cannot run alone")):
        with pytest.raises(PlanError, match=words):
            prune(tmp_path / name, tmp_path / "out", batches=[torch.randint(3, 64, (2, 8))], budget=0.9)
        assert not (tmp_path / "out").exists()


def test_a_block_that_computes_something_else_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_causal(tmp_path / "dense")
    from etp_graph.compression.streamed import _write

    cut = _write._cut
    monkeypatch.setattr(_write, "_cut", lambda tensor, kept: cut(tensor, kept).flip(0))
    with pytest.raises(ExportError, match=r"model\.layers\.0: the class LlamaForCausalLM computes something else"):
        prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
