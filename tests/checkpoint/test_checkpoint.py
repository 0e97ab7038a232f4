"""Saved models come back bit for bit, in the modules that the architecture built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from etp_graph.checkpoint import load, read_manifest, save
from etp_graph.errors import CheckpointError
from etp_graph.graph import trace
from etp_graph.plan import Selection
from etp_graph.surgery import Edit, SurgeryRecord, get_record, prune_, set_record, write_attribute
from tests.support.models.toy import Toy
from tests.support.pruned_toy import X, assert_same, cut_, cut_toy_, state, trained_toy


class Tied(nn.Module):
    """Encoder and decoder share one weight; two modules are one object."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.again = self.encode
        if tie:
            self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.decode(self.encode(x)))


class Buffered(nn.Module):
    """A persistent buffer, and two that are not part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("scale", torch.rand(6))
        self.register_buffer("mask", torch.arange(6.0), persistent=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_round_trip_is_bit_identical(tmp_path: Path, rounds: int) -> None:
    model = trained_toy(rounds)
    loaded = load(save(model, tmp_path / "m"), build=Toy)
    assert_same(loaded, model)
    assert len(get_record(loaded).selections) == rounds
    assert torch.equal(loaded.eval()(X), model(X))
    assert loaded.norm.num_batches_tracked == rounds + 1


def test_surgery_goes_on_after_loading(tmp_path: Path) -> None:
    model = trained_toy(1)
    loaded = load(save(model, tmp_path / "a"), build=Toy)
    assert_same(cut_toy_(loaded, 4, 3), cut_toy_(model, 4, 3))
    assert_same(load(save(loaded, tmp_path / "b"), build=Toy), model)


def mixed() -> nn.Module:
    """Layers with other attributes and names than Toy's: depthwise, GroupNorm, PReLU, weight norm, LayerNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.PReLU(16), nn.Conv2d(16, 16, 3, groups=16),
        weight_norm(nn.Conv2d(16, 12, 3)), nn.GroupNorm(2, 12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 4),
    )  # fmt: skip


def test_rounds_of_surgery(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mixed()
    for i in range(3):
        plan = trace(model, X, check=False)
        keep = {}
        for group in plan.prunable:
            mask = torch.ones(group.blocks, group.n_units // group.blocks, dtype=torch.bool)
            mask[:, torch.randperm(mask.shape[1])[: group.multiple]] = False
            keep[group.name] = mask.flatten()
        prune_(model, plan, Selection(keep))
        model.train()(X)
        path = save(model.eval(), tmp_path / str(i))
        loaded = load(path, build=mixed)
        assert_same(loaded, model)
        assert torch.equal(loaded.eval()(X), model(X))
        model = loaded  # the next round starts from the checkpoint
    assert {e.name for e in get_record(model).edits} >= {"groups", "num_parameters", "num_channels", "normalized_shape"}
    assert "4.parametrizations.weight.original1" in get_record(model).tensors
    assert len(get_record(model).fingerprints) == 3


def test_odd_bits_survive(tmp_path: Path) -> None:
    model = Toy()
    odd = torch.tensor([0x7FC12345, 0x7F800000, -0x80000000, 1, 0x7F812345], dtype=torch.int32)
    model.linear.bias.data = odd.view(torch.float32)  # NaNs with payload, infinity, -0, a subnormal number
    assert_same(load(save(model, tmp_path / "m"), build=Toy), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_element_types(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(trained_toy(1).to(dtype), tmp_path / "m")
    assert_same(load(path, build=lambda: Toy().to(dtype)), trained_toy(1).to(dtype))


def test_an_architecture_of_another_floating_type_rounds_the_values(tmp_path: Path) -> None:
    path = save(trained_toy(1), tmp_path / "m")
    assert_same(load(path, build=lambda: Toy().bfloat16()), trained_toy(1).bfloat16())
    with torch.device("meta"):
        skeleton = Toy().bfloat16()
    assert_same(load(path, build=skeleton), trained_toy(1).bfloat16())


def test_an_integer_type_is_no_floating_one(tmp_path: Path) -> None:
    path = save(trained_toy(1), tmp_path / "m")
    wrong = Toy()
    wrong.linear.bias = nn.Parameter(torch.zeros(wrong.linear.bias.shape, dtype=torch.int32), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"^linear.bias is saved as float32.*to\(torch\.float32\)"):
        load(path, build=wrong)


def test_tensors_on_the_meta_device_are_tied_as_they_were(tmp_path: Path) -> None:
    path = save(Tied(), tmp_path / "m")
    with torch.device("meta"):
        apart = Tied()
        apart.decode.weight = nn.Parameter(torch.empty(apart.decode.weight.shape))
    again = load(path, build=apart)
    assert again.decode.weight is again.encode.weight


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    model = cut_(Tied(), {"encode.weight": (3, 3), "encode.bias": (3,), "decode.bias": (3,)},
                 {"encode.out_features": 3, "decode.out_features": 3})  # fmt: skip
    path = save(model, tmp_path / "m")
    manifest = read_manifest(path)
    assert manifest.aliases == {
        "decode.weight": "encode.weight", "again.weight": "encode.weight", "again.bias": "encode.bias"
    }  # fmt: skip
    assert set(manifest.tensors) == {"encode.weight", "encode.bias", "decode.bias"}
    loaded = load(path, build=Tied)
    assert_same(loaded, model)
    assert loaded.decode.weight is loaded.encode.weight is loaded.again.weight
    with pytest.raises(CheckpointError, match="tie them"):
        load(path, build=lambda: Tied(tie=False))
    with pytest.raises(CheckpointError, match="separate"):
        load(save(Tied(tie=False), tmp_path / "n"), build=Tied)


def test_parameters_on_one_memory_stay_so(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Tied(tie=False)
        model.decode.weight.data = model.encode.weight.data
        return model

    model = build()
    loaded = load(save(model, tmp_path / "m"), build=build)
    assert_same(loaded, model)
    assert loaded.decode.weight.data_ptr() == loaded.encode.weight.data_ptr()


def test_buffers_outside_the_state_dict_are_stored_where_surgery_cut_them(tmp_path: Path) -> None:
    model = cut_(Buffered(), {"fc.weight": (4, 5), "scale": (5,), "mask": (5,)}, {"fc.in_features": 5})
    path = save(model, tmp_path / "m")
    assert set(read_manifest(path).tensors) == {"fc.weight", "fc.bias", "scale", "mask"}
    assert_same(load(path, build=Buffered), model)
    with torch.device("meta"):
        hollow = Buffered()
    with pytest.raises(CheckpointError, match=r"^table is on the meta device"):
        load(path, build=hollow)


def test_parametrized_names(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.ReLU(), weight_norm(nn.Linear(6, 2)))

    sizes = {"0.parametrizations.weight.original0": (5,), "0.parametrizations.weight.original1": (5,), "0.bias": (5,),
             "2.parametrizations.weight.original1": (2, 5)}  # fmt: skip
    model = cut_(build(), sizes, {"0.out_features": 5, "2.in_features": 5})
    loaded = load(save(model, tmp_path / "m"), build=build)
    assert_same(loaded, model)
    assert torch.equal(loaded(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_tuple_attribute(tmp_path: Path) -> None:
    model = nn.LayerNorm(6)
    edit = Edit(module="", name="normalized_shape", item=-1, value=4)
    write_attribute(model, edit)
    model.weight.data, model.bias.data = torch.rand(4), torch.rand(4)
    set_record(model, SurgeryRecord(edits=(edit,), tensors=("weight", "bias")))
    loaded = load(save(model, tmp_path / "m"), build=lambda: nn.LayerNorm(6))
    assert loaded.normalized_shape == (4,)
    assert_same(loaded, model)
    with pytest.raises(CheckpointError, match=r"\[4\], the architecture has \[3\]"):
        load(tmp_path / "m", build=nn.LayerNorm(3))


def test_the_built_module_keeps_objects_layout_and_requires_grad(tmp_path: Path) -> None:
    saved = trained_toy(1)
    build = Toy().to(memory_format=torch.channels_last)
    build.conv1.weight.requires_grad_(False)
    build.conv2.weight.grad = torch.ones_like(build.conv2.weight)
    objects = {name: id(p) for name, p in build.named_parameters()}
    loaded = load(save(saved, tmp_path / "m"), build=build)
    assert loaded is build
    assert {name: id(p) for name, p in loaded.named_parameters()} == objects
    assert not loaded.conv1.weight.requires_grad
    assert loaded.conv2.weight.requires_grad
    assert loaded.conv2.weight.grad is None
    assert loaded.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(loaded, saved)


def test_a_module_on_the_meta_device_is_materialised(tmp_path: Path) -> None:
    with torch.device("meta"):
        hollow, tied = Toy(), Tied()
    hollow.conv1.weight.requires_grad_(False)
    loaded = load(save(trained_toy(1), tmp_path / "m"), build=hollow)
    assert_same(loaded, trained_toy(1))
    assert not loaded.conv1.weight.requires_grad
    assert torch.equal(loaded.eval()(X), trained_toy(1)(X))
    source = Tied()
    loaded = load(save(source, tmp_path / "t"), build=tied)
    assert_same(loaded, source)
    assert loaded.decode.weight is loaded.encode.weight


def test_saving_under_inference_mode_and_loading_gives_trainable_parameters(tmp_path: Path) -> None:
    model, build = trained_toy(1), Toy()
    with torch.inference_mode():
        loaded = load(save(model, tmp_path / "m"), build=build)
    assert_same(loaded, model)
    loaded(X).sum().backward()
    assert loaded.conv1.weight.grad is not None


def test_a_failure_while_writing_the_module_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, build = save(trained_toy(1), tmp_path / "m"), Toy()
    before = state(build)
    interrupted = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr("etp_graph.surgery._record.size_caches_by_keys_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(path, build=build)
    assert state(build) == before


class Extra(nn.Linear):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None: ...


def _swapped_head() -> nn.Module:
    model = trained_toy(1)
    model.linear = nn.Identity()
    return model


def _edited() -> nn.Module:
    model = trained_toy(1)
    model.conv1.out_channels = 8
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Toy().to("meta"), "conv1.weight"),
        (lambda: nn.LazyLinear(3), "no ordinary dense tensor"),
        (lambda: nn.ParameterList([torch.zeros(2, dtype=torch.complex128)]), "complex128"),
        (lambda: nn.Sequential(Extra(2, 2)), "extra state"),
        (lambda: nn.Sequential(trained_toy(1)), "pruned on its own"),
        (lambda: torch.compile(Toy()), "compiled"),
        (_swapped_head, "linear"),
        (_edited, "conv1.out_channels is 8"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, make: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        save(make(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: nn.Linear(2, 2), "build the one that was saved"),
        (lambda: nn.Sequential(Toy()), "build the one that was saved"),
        (lambda: trained_toy(1), "pruned before"),
        (lambda: cut_toy_(Toy(), 6, 4), "pruned before"),
        (lambda: 3, "expected an nn.Module"),
        (lambda: _with(Toy(), "linear", nn.Linear(24, 6)), r"linear.bias .*\[5\], .* \[6\]"),
        (lambda: _with(Toy(), "conv1", nn.Conv2d(3, 6, 3, bias=False)), "conv1.weight"),
        (lambda: _with(Toy(), "conv1", _text_channels()), "is .8., and cannot become 7"),
        (lambda: _with(Toy(), "extra", nn.Linear(1, 1)), "extra.weight"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, build: Callable[[], nn.Module], match: str) -> None:
    model = build()
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(CheckpointError, match=match):
        load(save(trained_toy(1), tmp_path / "m"), build=lambda: model)
    assert before is None or state(model) == before


def _text_channels() -> nn.Module:
    module = Toy().conv1
    module.out_channels = "8"
    return module


def _with(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    setattr(model, name, module)
    return model
