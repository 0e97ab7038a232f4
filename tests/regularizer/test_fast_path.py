"""The fast path of the force does what the equations say, on every architecture of the coverage list."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.plan import Plan
from etp_graph.regularizer import Regularizer
from etp_graph.units import _kernels as kernels
from etp_graph.units._kernels import Layout
from tests.support import force_by_equations as reference

LARGE = ("vision", "timm")
NAMES = [pytest.param(n, marks=pytest.mark.slow) if e.family in LARGE else n for n, e in registry().items()]
STEP = 0.5
BETA = 1e-2


def prepared(name: str, dtype: torch.dtype) -> tuple[nn.Module, Plan]:
    """The model with small integer weights, whose squares every format adds without rounding, and its plan."""
    torch.manual_seed(0)
    entry = registry()[name]
    model = entry.build()
    plan = etp.trace(model, entry.small(), check=False, prune="all")
    model = model.to(dtype)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randint(-3, 4, parameter.shape))
    return model, plan


def wanted(model: nn.Module, plan: Plan, reg: Regularizer) -> nn.Module:
    """The model after one step by the equations."""
    other = copy.deepcopy(model)
    pull = reg.forces() * reg.kappa * reg.strength
    reference.prox_(other, plan, pull, dict.fromkeys(plan.parameters, STEP))
    return other


def stepped(model: nn.Module, plan: Plan, reg: Regularizer) -> None:
    with reg.attach(torch.optim.SGD(model.parameters(), lr=STEP)) as attached:
        assert attached is reg
        reg._optimizers[0].step()  # without gradients only the force acts


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_bit_identical_in_double(name: str) -> None:
    model, plan = prepared(name, torch.float64)
    reg = Regularizer(model, plan, beta=BETA, kappa="one")
    expected = wanted(model, plan, reg)
    before = copy.deepcopy(model.state_dict())
    stepped(model, plan, reg)
    after = model.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(after[key], value), key
    assert any(not torch.equal(after[key], before[key]) for key in before), "the force did nothing"


@pytest.mark.parametrize("name", ["hf:bert", "hf:llama_gqa", "hf:mixtral", "informer", "pyg:gat3", "cifar_resnet20"])
@pytest.mark.parametrize(("dtype", "beta", "tolerance"), [(torch.float32, BETA, 1e-6), (torch.bfloat16, 2.0, 2**-7)])
def test_one_step_from_random_weights(name: str, dtype: torch.dtype, beta: float, tolerance: float) -> None:
    model, plan = prepared(name, dtype)
    for parameter in model.parameters():
        parameter.data.normal_()
    reg = Regularizer(model, plan, beta=beta, order="importance")
    double = copy.deepcopy(model).double()
    expected = wanted(double, plan, reg).state_dict()
    before = double.state_dict()
    stepped(model, plan, reg)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            error = (value.double() - expected[key]).abs()
            assert bool((error <= tolerance * before[key].abs() + 1e-30).all()), key


SMALL = [((7,), (0,)), ((5, 3), (0,)), ((5, 3), (1,)), ((5, 3), (1, 0)), ((4, 3, 2, 2), (0, 1)), ((4, 3, 5), (2, 1))]
LONG = [((300, 700), (0,)), ((700, 300), (1,)), ((70, 40), (0, 1))]


@pytest.mark.parametrize(("shape", "over"), [*SMALL, *LONG])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "every second"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1 << 19, 16])
def test_sums_and_products_along_axes(
    shape: tuple[int, ...], over: tuple[int, ...], form: str, dtype: torch.dtype, chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    torch.manual_seed(0)
    value = torch.randn(shape, dtype=torch.float64).to(dtype)
    if form == "channels_last":
        value = value.movedim(1, -1).contiguous().movedim(-1, 1) if len(shape) > 1 else value
    elif form == "every second":
        value = torch.cat([value, value], -1)[..., ::2]
    layout = Layout(value, over)
    for axis, found in zip(over, layout.square_sums(value), strict=True):
        right = value.double().square().movedim(axis, 0).flatten(1).sum(1) if len(shape) > 1 else value.double() ** 2
        torch.testing.assert_close(found.double(), right, rtol=1e-14 if dtype == torch.float64 else 3e-6, atol=0)
    factors = [(axis, torch.rand(shape[axis]).to(dtype)) for axis in over]
    right = value.clone()
    for axis, factor in factors:
        right *= factor.view([-1 if d == axis else 1 for d in range(len(shape))])
    layout.scale_(value, factors)
    assert torch.equal(value, right)


@pytest.mark.parametrize("rows", [256, 5_000, 60_000])
@pytest.mark.parametrize("over", [(0,), (1,), (0, 1)])
def test_long_sums_keep_their_digits(rows: int, over: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for shape in ((rows, 3), (3, rows)):
        value = torch.rand(shape) + 0.5
        for axis, found in zip(over, Layout(value, over).square_sums(value), strict=True):
            right = value.double().square().sum(1 - axis)
            torch.testing.assert_close(found.double().sqrt(), right.sqrt(), rtol=1e-6, atol=0)


def test_a_change_of_the_memory_format_is_noticed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).double()
    plan = etp.trace(model, torch.randn(1, 3, 8, 8).double())
    reg = Regularizer(model, plan, beta=BETA)
    plain = norms(reg)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(norms(reg), plain, rtol=1e-14, atol=0)


def norms(reg: Regularizer) -> Tensor:
    """Group norms by the fast path, checked against the equation."""
    found = reg._pull.norms()
    torch.testing.assert_close(found, reference.square_norms(reg.model, reg.plan).sqrt(), rtol=1e-14, atol=0)
    assert math.isfinite(float(found.sum()))
    return found


class Reading(TorchDispatchMode):
    """Notes every operator that makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"):
            self.found.append(name)
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        ):
            self.found.append(f"{name} by a mask")
        if name in ("copy_", "_to_copy") and kwargs and kwargs.get("device") is not None:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


FORCES = [etp.forces.exponential(), etp.forces.growing(), etp.forces.lasso()]


@pytest.mark.parametrize(
    ("mode", "force"), [*(("gradient", force) for force in FORCES), *(("prox", force) for force in FORCES[:2])]
)
def test_a_step_never_reads_a_value_on_the_host(
    mode: Any, force: etp.forces.Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = prepared("cifar_resnet20", torch.float32)
    reg = Regularizer(model, plan, beta=BETA, force=force, mode=mode)
    for layout in _layouts(reg):
        layout._numpy = False  # as on a device, where NumPy cannot read
    monkeypatch.setattr(kernels, "_row_squares", None)
    monkeypatch.setattr(kernels, "_column_squares", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=STEP)
    with reg.attach(optimizer), Reading() as reading:
        for _ in range(3):
            optimizer.step()
    assert not reading.found


def _layouts(reg: Regularizer) -> list[Layout]:
    """The layouts of all weights, made now."""
    return [reg._units._layout_of(name, tensor) for name, tensor in reg._binding.tensors.items()]


def test_a_compiled_model_trains_with_the_force() -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
        plan = etp.trace(model, torch.randn(2, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        with Regularizer(model, plan, beta=1e-2).attach(optimizer):
            for step in range(5):
                x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                loss = run(x).square().sum()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
