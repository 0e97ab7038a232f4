"""Where a dense model goes (``torch.export``, ``torch.compile``, ONNX), the pruned one goes, too, and is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from benchmarks.export.page import MARK, TOLERANCE, write_page
from benchmarks.export.run import USUAL, difference, network
from benchmarks.models import Entry, registry
from etp_graph.surgery import get_record

NAMES = (
    "cifar_resnet20", "mobilenet_v3_small", "hf:bert", "hf:gpt2", "hf:llama_gqa", "hf:mixtral", "hf:t5", "hf:vit",
    "hf:swin", "hf:patchtst", "pyg:gat2", "rnn:lstm_lm", "informer",
)  # fmt: skip
IN_ONNX = ("cifar_resnet20", "hf:llama_gqa", "hf:vit", "pyg:gat2", "rnn:lstm_lm")
"""Of these also in the fast suite; a conversion takes as long as everything else together."""
FAST = [(name, way) for name in NAMES for way in USUAL if way != "onnx" or name in IN_ONNX]
FAMILIES = ("huggingface", "graphs", "recurrent", "forecasting")
STANDINS = ("swin_v2_t", "timm:swin_tiny_patch4_window7_224", "timm:levit_128s", "vit_b_16")
"""Networks in which surgery leaves another class in the place of a module."""
SLOW = [
    (name, way)
    for name, entry in registry().items() if entry.family in FAMILIES or name in (*STANDINS, *NAMES)
    for way in USUAL if (name, way) not in FAST
]  # fmt: skip
_GROUPED = "ONNX has no operator for the grouped product of experts"
_PROJECTED = "the converter makes an LSTM with projections whose states have different ranks"
_VIEW = "AOTAutograd's functional form refuses a view"
_MASK = "while exporting, a mask is made for the length before distilling; eager mode leaves it out"
DENSE_NEITHER = {
    ("hf:mixtral", "onnx"): _GROUPED,
    ("hf:qwen2_moe", "onnx"): _GROUPED,
    ("hf:qwen3_moe", "onnx"): _GROUPED,
    ("rnn:lstm_lm_projected", "onnx"): _PROJECTED,
    ("rnn:lstm_lm_tied_projected", "onnx"): _PROJECTED,
    ("hf:patchtst", "compile"): _VIEW,
    ("hf:patchtst_classifier", "compile"): _VIEW,
    ("hf:informer", "export"): _MASK,
    ("hf:informer", "onnx"): _MASK,
    ("hf:informer_full", "export"): _MASK,
    ("hf:informer_full", "onnx"): _MASK,
    ("hf:time_series_transformer", "onnx"): "ONNX has no logarithm of the gamma function",
}
"""What the dense model cannot do either, and why: the limit is the model's, or the exporter's."""


def check(name: str, way: str) -> None:
    """The pruned model goes there, or it is on the list, and the dense one does not go there either."""
    if way == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    entry = registry()[name]
    if (name, way) in DENSE_NEITHER:
        assert not goes(network(entry, pruned=False), entry, way), f"it does now: shorten the list by {name}, {way}"
        return
    model = network(entry, pruned=True)
    assert get_record(model).selections
    assert difference(model, entry.small(), way) <= TOLERANCE


def goes(model: nn.Module, entry: Entry, way: str) -> bool:
    """Whether a model goes there and computes the same."""
    refusals: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError)
    if way == "onnx":
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail

        refusals = (*refusals, Fail)
    try:
        return difference(model, entry.small(), way) <= TOLERANCE
    except refusals:
        return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "way"), FAST)
def test_pruned_models_go_where_dense_ones_go(name: str, way: str) -> None:
    check(name, way)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "way"), SLOW)
def test_every_small_model_goes_where_the_dense_one_goes(name: str, way: str) -> None:
    check(name, way)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet20", "hf:bert", "pyg:gat2"])
def test_machine_code_of_a_pruned_model(name: str) -> None:
    check(name, "inductor")


def test_the_page_keeps_the_text_above_its_table(tmp_path: Path) -> None:
    found = {
        "hf:bert/export/pruned": {"error": 2e-7},
        "hf:bert/onnx/pruned": {"verdict": "exception: ConversionError: no <op> | here"},
        "hf:bert/onnx/dense": {"error": 0.0},
        "hf:gpt2/onnx/pruned": {"error": 0.5},
        "hf:gpt2/onnx/dense": {"verdict": "no answer in 600 s"},
    }
    page = tmp_path / "export.md"
    page.write_text(f"# By hand\n\n{MARK}old table\n")
    write_page({"measurements": found, "conditions": {"torch": "2"}}, page)
    text = page.read_text()
    assert text.startswith("# By hand\n\n<!--")
    assert "old table" not in text
    assert "| hf:bert | 2e-07 | pruned only: ConversionError: no &lt;op> / here |" in text
    assert "| hf:gpt2 | - | dense neither: differs by 5e-01 |" in text
