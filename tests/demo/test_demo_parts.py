"""Models, data, training loop and baseline of the demo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etp_graph.demo.zoo import data, models, training
from etp_graph.demo.zoo import torch_pruning as baselines
from etp_graph.errors import BudgetError, EtpError

DIGIT = (1, 8, 8)
PHOTO = (3, 32, 32)

# Parameters: by hand from the layer sizes, and in agreement with the literature (0.27 M, 0.85 M, 1.7 M, 20 M, 1.0 M).
MODELS: list[tuple[Callable[[], nn.Module], tuple[int, int, int], int, int]] = [
    (models.SmallResNet, DIGIT, 10, 174_970),
    (models.resnet20, PHOTO, 10, 269_722),
    (models.resnet56, PHOTO, 10, 853_018),
    (models.resnet164, PHOTO, 10, 1_703_258),
    (models.vgg19_bn, PHOTO, 100, 20_081_188),
    (models.densenet40, PHOTO, 10, 1_019_722),
]


@pytest.fixture(scope="module")
def digits() -> data.Split:
    pytest.importorskip("sklearn")
    return data.digits()


def tiny() -> models.SmallResNet:
    return models.SmallResNet(widths=(8, 12), blocks=1)


# --- models


@pytest.mark.parametrize(("build", "shape", "classes", "parameters"), MODELS, ids=lambda v: getattr(v, "__name__", ""))
def test_model_has_the_published_size_and_uses_every_parameter(build, shape, classes, parameters):
    model = build()
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("build", [models.CifarResNet, models.PreactResNet, models.DenseNet])
def test_impossible_depth_is_refused(build):
    with pytest.raises(ValueError, match="depth 21 is not"):
        build(21)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 3), (4, 0)])
def test_padded_shortcut_puts_each_channel_where_it_says(before, after):
    x = torch.randn(2, 5, 7, 6)
    out = models.PaddedShortcut(stride=2, before=before, after=after)(x)
    assert out.shape == (2, before + 5 + after, 4, 3)
    for channel in range(out.shape[1]):
        inside = before <= channel < before + 5
        expected = x[:, channel - before, ::2, ::2] if inside else torch.zeros(2, 4, 3)
        assert torch.equal(out[:, channel], expected)


def test_padded_shortcuts_of_a_cifar_resnet_add_a_quarter_on_each_side():
    found = [m for m in models.resnet20().modules() if isinstance(m, models.PaddedShortcut)]
    assert [(m.stride, m.before, m.after) for m in found] == [(2, 8, 8), (2, 16, 16)]


# --- data


def test_digits_are_split_without_overlap_and_in_proportion(digits):
    parts = [(digits.train_x, digits.train_y), (digits.val_x, digits.val_y), (digits.test_x, digits.test_y)]
    assert sum(len(x) for x, _ in parts) == 1797
    total = sum(torch.bincount(y, minlength=10) for _, y in parts)
    for (x, y), fraction in zip(parts, (0.6, 0.15, 0.25), strict=True):
        assert x.shape == (len(y), *DIGIT)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.min() == -1
        assert x.max() == 1
        assert (torch.bincount(y, minlength=10) - fraction * total).abs().max() <= 1.5


def test_positions_of_the_split_are_a_partition_that_depends_on_the_seed_alone():
    labels = torch.arange(1000) % 7
    parts = data._stratified(labels, (0.6, 0.15), 3)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    again, other = data._stratified(labels, (0.6, 0.15), 3), data._stratified(labels, (0.6, 0.15), 4)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], other[0])


def test_data_root_obeys_the_environment_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "mine"))
    assert data.data_root() == tmp_path / "mine"
    monkeypatch.delenv(data.ENVIRONMENT)
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    assert data.data_root() == tmp_path / "shared" / "data"


def _write_mosaics(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A copy of CIFAR-10's layout with random images: two training files and one test file."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tiles = np.repeat(rng.integers(0, 256, (20_000, 1, 1, 3), dtype=np.uint8), 32, 1).repeat(32, 2)
    tiles[:, 0, 0] = rng.integers(0, 256, (20_000, 3))
    for number, part in enumerate(tiles.reshape(2, 100, 100, 32, 32, 3)):
        mosaic = image.fromarray(part.swapaxes(1, 2).reshape(3200, 3200, 3))
        mosaic.save(folder / f"train_{number}.webp", lossless=True, quality=0, method=0)
        if number == 0:
            mosaic.save(folder / "test_0.webp", lossless=True, quality=0, method=0)
    labels = (np.arange(50_000) % 10).astype(np.uint8)
    np.savez(folder / "labels.npz", train_labels=labels, test_labels=labels[:10_000])
    return tiles, labels


def test_cifar_reads_only_what_is_needed_and_keeps_the_validation_images(tmp_path):
    tiles, labels = _write_mosaics(tmp_path / "cifar10")
    mean, std = torch.tensor(data.MEAN).view(3, 1, 1), torch.tensor(data.STD).view(3, 1, 1)

    split = data.cifar10(limit=9_950, validation=100, test_limit=20, root=tmp_path)  # crosses into the second file
    assert [len(v) for v in (split.train_y, split.val_y, split.test_y)] == [9_950, 100, 20]
    for position in (0, 9_899, 9_900, 9_949):
        pixels = (split.train_x[position] * std + mean) * 255
        assert torch.equal(pixels.round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(tiles[100 + position]))
        assert split.train_y[position] == labels[100 + position]
    assert torch.bincount(split.train_y).unique().numel() == 1

    fewer = data.cifar10(limit=10, validation=100, test_limit=10, root=tmp_path)
    assert torch.equal(fewer.val_x, split.val_x)
    assert torch.equal(fewer.train_x, split.train_x[:10])

    with pytest.raises(data.DataError, match=r"train_2\.webp.*ETP_GRAPH_DATA"):  # the copy is incomplete
        data.cifar10(limit=25_000, validation=0, test_limit=10, root=tmp_path)


@pytest.mark.parametrize("sizes", [{"limit": 50_000}, {"limit": -1}, {"test_limit": 10_001}, {"validation": 50_001}])
def test_cifar_sizes_that_do_not_exist_are_refused(sizes, tmp_path):
    with pytest.raises(data.DataError, match="50,000 training images"):
        data.cifar10(root=tmp_path, **sizes)


def test_cifar_downloads_what_is_not_there_and_says_what_to_set_if_it_cannot(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    asked = []

    class Offline:
        def __init__(self, root, *, train, download):
            asked.append((root, train, download))
            raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Offline)
    with pytest.raises(data.DataError, match=r"no route to host.*ETP_GRAPH_DATA"):
        data.cifar10(root=tmp_path)
    assert asked == [(str(tmp_path / "cifar10"), True, True)]

    class Online:
        def __init__(self, root, *, train, download):
            self.targets = [0] * 30 + [label for label in range(1, 10) for _ in range(30)]
            self.data = np.random.default_rng(train).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Online)
    split = data.cifar10(limit=20, validation=10, test_limit=10, root=tmp_path)
    assert torch.equal(split.train_y, torch.arange(20) % 10)
    assert not torch.equal(split.train_x[0], split.test_x[0])


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    for module in ("sklearn.datasets", "torchvision.datasets", "torch_pruning"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(data.DataError, match="etp-graph\\[demo\\]"):
        data.digits()
    with pytest.raises(data.DataError, match="etp-graph\\[demo\\]"):
        data.cifar10(root=tmp_path)
    with pytest.raises(EtpError, match="pip install torch-pruning"):
        baselines.depgraph_compress(tiny(), torch.zeros(1, *DIGIT), target_macs=1, train=lambda *_: None)


def test_weights_are_loaded_exactly_or_not_at_all(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    (tmp_path / "weights").mkdir()
    original, other = tiny(), tiny()
    save_file(original.state_dict(), tmp_path / "weights" / "tiny.safetensors")
    data.load_weights(other, "tiny")
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), other.parameters(), strict=True))

    wider = models.SmallResNet(widths=(8, 16), blocks=1)
    before = [p.clone() for p in wider.parameters()]
    (tmp_path / "weights" / "torn.safetensors").write_bytes(b"\xff" * 40)
    for name, message in (("tiny", "does not fit"), ("absent", "no weights at"), ("torn", "not a safetensors")):
        with pytest.raises(data.DataError, match=message):
            data.load_weights(wider, name)
    assert all(torch.equal(a, b) for a, b in zip(before, wider.parameters(), strict=True))


@pytest.mark.parametrize(("name", "at_least"), [("resnet20", 0.92), ("resnet56", 0.935)])
def test_published_weights_reach_their_accuracy(name, at_least):
    if not (data.data_root() / "weights" / f"{name}_cifar10.safetensors").is_file():
        pytest.skip("no copy of CIFAR-10 and its weights here")
    model = getattr(models, name)()
    data.load_weights(model, f"{name}_cifar10")
    n = 1000 if name == "resnet20" else 400
    split = data.cifar10(limit=0, validation=0, test_limit=n)
    assert training.accuracy(model, split.test_x, split.test_y) >= at_least - 0.02


# --- training


def test_training_learns_and_repeats_exactly(digits):
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = models.SmallResNet(widths=(8, 16), blocks=1)
        losses = training.train_epochs(model, digits, epochs=4, lr=0.2, batch_size=64, augment=training.shift)
        runs.append((losses, training.accuracy(model, digits.test_x, digits.test_y)))
    assert runs[0] == runs[1]
    assert runs[0][1] > 0.85
    assert runs[0][0][-1] < 0.5 * runs[0][0][0]


def test_every_method_sees_the_same_batches(digits):
    def seen(model: nn.Module, attach) -> Tensor:
        batches: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, args: batches.append(args[0].clone()))
        training.train_epochs(model, digits, epochs=2, batch_size=400, augment=training.shift, seed=5, attach=attach)
        return torch.cat(batches)

    plain = seen(tiny(), None)
    noisy = seen(
        models.SmallResNet(widths=(8, 8), blocks=1), lambda o: o.register_step_post_hook(lambda *_: torch.rand(7))
    )
    assert torch.equal(plain, noisy)
    assert len(plain) == 2 * len(digits.train_x)
    assert not torch.equal(plain[: len(plain) // 2], plain[len(plain) // 2 :])


def test_hooks_run_in_order_and_learning_rate_rises_and_falls(digits):
    events: list[str] = []
    steps: list[training.Step] = []

    def attach(optimizer: torch.optim.Optimizer) -> None:
        events.append("attach")
        optimizer.register_step_pre_hook(lambda *_: events.append("step"))

    losses = training.train_epochs(
        tiny(), digits, epochs=2, lr=0.1, batch_size=300, attach=attach,
        on_step=lambda step: (events.append("on_step"), steps.append(step)),
        progress=lambda done, total, loss: events.append(f"epoch {done}/{total}"), warmup=0.3,
    )  # fmt: skip
    one = ["step", "on_step"] * 4
    assert events == ["attach", *one, "epoch 1/2", *one, "epoch 2/2"]
    assert [(s.number, s.total, s.epoch) for s in steps] == [(i, 8, 1 + (i > 4)) for i in range(1, 9)]
    assert losses == pytest.approx([float(sum(s.loss for s in steps[i : i + 4])) / 4 for i in (0, 4)])
    rates = [s.lr for s in steps]
    peak = rates.index(max(rates))
    assert 0 < peak < 7
    assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)
    assert max(rates) <= 0.1
    assert rates[-1] == pytest.approx(0.001)


def test_a_last_batch_of_one_image_is_left_out(digits):
    few = data.Split(
        train_x=digits.train_x[:9], train_y=digits.train_y[:9],
        val_x=digits.val_x, val_y=digits.val_y, test_x=digits.test_x, test_y=digits.test_y,
    )  # fmt: skip
    steps: list[training.Step] = []
    training.train_epochs(tiny(), few, epochs=1, lr=0.01, batch_size=4, on_step=steps.append)
    assert [(s.number, s.total) for s in steps] == [(1, 2), (2, 2)]


def test_training_refuses_nonsense_and_stops_at_an_infinite_loss(digits):
    for wrong in ({"epochs": -1}, {"batch_size": 1}, {"warmup": 1.0}):
        with pytest.raises(ValueError, match="train_epochs"):
            training.train_epochs(tiny(), digits, **{"epochs": 1, **wrong})
    model = tiny()
    with torch.no_grad():
        model.linear.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="epoch 1"):
        training.train_epochs(model, digits, epochs=1, batch_size=300)


def test_accuracy_counts_right_answers_whatever_the_batch_and_restores_modes(digits):
    model = tiny().train()
    model.bn1.eval()
    with torch.no_grad():
        model.eval()
        expected = (model(digits.test_x).argmax(1) == digits.test_y).float().mean().item()
    model.train()
    model.bn1.eval()
    for batch in (7, 450, 1000):
        assert training.accuracy(model, digits.test_x, digits.test_y, batch=batch) == pytest.approx(expected)
    assert model.training
    assert not model.bn1.training
    with pytest.raises(ValueError, match="0 images"):
        training.accuracy(model, digits.test_x[:0], digits.test_y[:0])


@pytest.mark.parametrize(("augment", "pad"), [(training.shift, 1), (training.crop_flip, 4)])
def test_augmentation_yields_a_window_of_the_padded_image(augment, pad):
    x = torch.randn(12, 2, 9, 9)
    out = augment(x, torch.Generator().manual_seed(0))
    assert out.shape == x.shape
    padded = nn.functional.pad(x, (pad,) * 4, mode="replicate" if augment is training.shift else "constant")
    kinds = set()
    for image, frame in zip(out, padded, strict=True):
        matches = [
            (dy, dx, flip)
            for dy in range(2 * pad + 1)
            for dx in range(2 * pad + 1)
            for flip in (False, True)
            if torch.equal(image, _window(frame, dy, dx, flip))
        ]
        assert len(matches) == 1
        kinds.add(matches[0])
    assert len(kinds) > 4
    assert {flip for *_, flip in kinds} == ({False} if augment is training.shift else {False, True})


def _window(frame: Tensor, dy: int, dx: int, flip: bool) -> Tensor:
    window = frame[:, dy : dy + 9, dx : dx + 9]
    return window.flip(2) if flip else window


# --- the DepGraph baseline


def _count(model: nn.Module, x: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("build", "shape"), [(tiny, DIGIT), (lambda: models.CifarResNet(8), PHOTO)], ids=["option B", "option A"]
)
def test_depgraph_reaches_its_target_and_trains_before_pruning(build, shape):
    model, x = build(), torch.randn(2, *shape)
    before = [p.clone() for p in model.parameters()]
    calls: list[str] = []

    def train(net: nn.Module, attach) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        attach(optimizer)
        net.train()(x).sum().mul(0).backward()
        optimizer.step()
        calls.append("trained")

    macs = _count(model, x[:1])
    report = baselines.depgraph_compress(
        model, x, target_macs=macs // 4, train=train, reg=0.1, iterative_steps=50, count=lambda net: _count(net, x[:1])
    )
    assert calls == ["trained"]
    assert report.base_macs == macs
    assert report.macs == _count(model, x[:1]) <= macs // 4
    assert report.base_params == sum(p.numel() for p in before)
    assert report.params == sum(p.numel() for p in model.parameters()) < report.base_params
    assert model(x).shape == (2, 10)
    # The gradient of the loss was zero: whatever moved the weights was the regularizer, and it only shrinks.
    assert model.linear.weight.norm() < before[-2].norm()


def test_depgraph_refuses_targets_that_make_no_sense_and_names_how_far_it_came():
    model, x = tiny(), torch.randn(1, *DIGIT)
    macs = _count(model, x)
    for target in (0, macs, 2 * macs):
        with pytest.raises(BudgetError, match=f"{macs} MACs"):
            baselines.depgraph_compress(
                model, x, target_macs=target, train=lambda *_: None, reg=0, count=lambda m: _count(m, x)
            )
    with pytest.raises(BudgetError, match="pruning steps end at"):
        baselines.depgraph_compress(model, x, target_macs=1, train=lambda *_: None, reg=0, iterative_steps=5)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 3)])
def test_channel_select_is_the_padded_shortcut_and_stays_exact_when_channels_go(before, after):
    x = torch.randn(2, 6, 8, 8)
    padded = models.PaddedShortcut(stride=2, before=before, after=after)
    wide = before + 6 + after
    select = baselines.ChannelSelect(channels_in=6, channels_out=wide, before=before, stride=2)
    assert torch.equal(select(x), padded(x))

    gone_in, gone_out = [1, 4], [0, before + 2, before + 4, wide - 1]
    masked = x.clone()
    masked[:, gone_in] = 0
    expected = padded(masked)[:, [c for c in range(wide) if c not in gone_out]]
    inputs = x[:, [c for c in range(6) if c not in gone_in]]
    for order in ("in first", "out first"):
        select = baselines.ChannelSelect(channels_in=6, channels_out=wide, before=before, stride=2)
        if order == "in first":
            select.drop_inputs(gone_in)
        select.drop_outputs(gone_out)
        if order == "out first":
            select.drop_inputs(gone_in)
        assert torch.equal(select(inputs), expected)


def _without_channels(gone: list[int]) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda _module, _args, out: out.index_fill(1, torch.tensor(gone), 0)


def test_groups_of_an_option_a_network_prune_exactly_once_its_shortcuts_are_replaced():
    tp = pytest.importorskip("torch_pruning")
    x = torch.randn(2, *PHOTO)
    for root in ("conv1", "layer2.0.conv2", "layer3.0.conv2", "layer2.0.conv1"):
        model = models.CifarResNet(8).eval()
        expected = model(x)
        baselines.replace_padded_shortcuts(model, x)
        assert torch.equal(model(x), expected)
        graph = tp.DependencyGraph().build_dependency(
            model, x, customized_pruners={baselines.ChannelSelect: baselines.select_pruner(tp)}
        )
        gone = [0, 3, 9]
        group = graph.get_pruning_group(model.get_submodule(root), tp.prune_conv_out_channels, gone)
        hooks = []
        for dependency, _ in group:
            layer = dependency.target.module
            masked = isinstance(layer, nn.BatchNorm2d | baselines.ChannelSelect)
            if masked and graph.is_out_channel_pruning_fn(dependency.handler):
                hooks.append(layer.register_forward_hook(_without_channels(gone)))
        reference = model(x)
        for hook in hooks:
            hook.remove()
        group.prune()
        assert len(hooks) > 0
        assert not torch.allclose(reference, expected)
        torch.testing.assert_close(model(x), reference)
