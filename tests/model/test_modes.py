"""Modes of a forward belong to its thread and are left as they were."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from threading import Event, Thread

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import etp_graph as etp
from etp_graph.model import (
    InFloat64,
    ModuleStack,
    WithoutDropout,
    norm_over_units,
    without_attention_fast_path,
    without_garbage_collection,
)
from etp_graph.model._modes import without_recurrent_dropout


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
}
FUSED = {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("mode", [without_attention_fast_path, WithoutDropout])
def test_any_function_mode_keeps_attention_off_its_fused_operator(kind: str, mode: Callable[[], object]) -> None:
    model, x = ATTENTION[kind]().eval(), torch.randn(1, 3, 8)
    args = (x, x, x) if kind == "attention" else (x,)
    with torch.no_grad(), Operators() as plain:
        model(*args)
    assert plain.names & FUSED, "the test shows nothing without a fast path"
    with torch.no_grad(), mode(), Operators() as seen:  # type: ignore[attr-defined]
        model(*args)
    assert not seen.names & FUSED
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_of_the_user_keep_their_order_and_see_the_stack() -> None:
    model, seen = nn.Sequential(nn.Linear(2, 2)), list[str]()
    model[0].register_forward_pre_hook(lambda *_: seen.append(f"first {len(stack.modules)}"))
    model[0].register_forward_hook(lambda *_: seen.append(f"after {len(stack.modules)}"))
    model[0].register_forward_pre_hook(lambda *_: seen.append(f"second {len(stack.modules)}"))
    before = [list(m._forward_pre_hooks.values()) + list(m._forward_hooks.values()) for m in model.modules()]
    with ModuleStack(model).watching() as stack:
        nn.Linear(2, 2)(torch.ones(2))  # a module of another model
        assert not stack.modules
        model(torch.ones(2))
    assert seen == ["first 2", "second 2", "after 1"]
    assert [list(m._forward_pre_hooks.values()) + list(m._forward_hooks.values()) for m in model.modules()] == before


class Catching(nn.Module):
    """Goes on after a module inside has failed."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.inner, self.error = nn.Sequential(nn.Linear(2, 2)), error
        self.inner[0].register_forward_hook(self.fail)
        self.depth = -1

    def fail(self, *_: object) -> None:
        raise self.error

    def forward(self, x: Tensor) -> Tensor:
        with suppress(self.error):
            self.inner(x)
        return x


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_modules_that_are_left_by_an_exception_leave_the_stack(error: type[BaseException]) -> None:
    model = Catching(error)
    outer, depths = nn.Sequential(model, nn.ReLU()), list[int]()
    outer[1].register_forward_hook(lambda *_: depths.append(len(stack.modules)))
    with ModuleStack(outer).watching() as stack:
        outer(torch.ones(2))
    assert depths == [1], "the root alone is running"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_run_without_dropout(kind: type[nn.RNNBase], packed: bool) -> None:
    model = kind(4, 6, num_layers=2, dropout=0.9).train()
    x = torch.randn(5, 3, 4)
    given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2])) if packed else x
    with WithoutDropout():
        found = model(given)[1]
    expected = model.eval()(given)[1]
    torch.testing.assert_close(found, expected)


def test_recurrent_layers_train_on_cuda_only() -> None:
    class OnCuda:
        device = torch.device("cuda")

    rest = ((), [], True, 2, 0.5, False, False, True)
    assert without_recurrent_dropout((torch.ones(1), *rest))[5:7] == (0.0, False)
    assert without_recurrent_dropout((OnCuda(), *rest))[5:7] == (0.0, True)
    assert without_recurrent_dropout((OnCuda(), OnCuda(), *rest))[6:8] == (0.0, True), "with batch sizes"


def test_the_collector_is_on_again_after_the_last_thread() -> None:
    entered, leave = Event(), Event()

    def other() -> None:
        with without_garbage_collection():
            entered.set()
            leave.wait()

    thread = Thread(target=other)
    with without_garbage_collection():
        thread.start()
        entered.wait()
    assert not gc.isenabled(), "the other thread still needs it off"
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_the_collector_stays_off_if_it_was_and_is_on_after_an_error() -> None:
    with pytest.raises(LookupError), without_garbage_collection():
        raise LookupError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_autocast_of_the_user_gets_no_casts_of_a_trace() -> None:
    """A cast of a weight that was made without gradients would be used again, and the weight would get no gradient."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        etp.trace(model, x)
        model(x).float().sum().backward()
    assert model[0].weight.grad is not None and model[2].weight.grad is not None


def test_numbers_of_python_are_not_rounded_in_float64() -> None:
    with InFloat64():
        assert float(torch.tensor(0.1)) == 0.1
        assert torch.tensor(torch.finfo(torch.float64).min).dtype == torch.float64
        assert torch.full((2,), -1e300).tolist() == [-1e300] * 2
        assert torch.arange(3).dtype == torch.int64
        assert torch.ones(2, dtype=torch.float16).dtype == torch.float16
        assert torch.linspace(0, 1, 4).dtype == torch.float64
    assert torch.tensor(0.1).dtype == torch.float32


def test_code_that_this_library_calls_stays_in_float64() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    weight = torch.randn(5, dtype=torch.float64)

    def norm(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        y = x.float()
        return (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).type_as(x) * tensors[0]

    want = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    for outer in (nullcontext(), WithoutDropout()):
        with outer, InFloat64():
            assert (norm_over_units(x, -1, [weight], norm) - want).abs().max() < 1e-14
        with InFloat64(), outer:
            assert (norm_over_units(x, -1, [weight], norm) - want).abs().max() < 1e-14


@pytest.mark.parametrize("rows", [9, 7])
def test_products_of_groups_of_rows_run_in_float64(rows: int) -> None:
    x, weights = torch.randn(9, 8), torch.randn(3, 8, 16)
    ends = torch.tensor([4, 4, rows], dtype=torch.int32)
    want = torch.cat([x[:4] @ weights[0], x[4:rows] @ weights[2]])
    wide = x.double().requires_grad_()
    with InFloat64():
        found = torch.nn.functional.grouped_mm(wide, weights.double(), offs=ends)
    assert found.dtype == torch.float64
    assert torch.allclose(found[:rows].float(), want, atol=1e-5)
    found[:rows].sum().backward()
    assert wide.grad is not None
    assert torch.allclose(wide.grad[4:rows], weights[2].double().sum(-1).expand(rows - 4, 8))
