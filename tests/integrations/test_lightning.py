"""Lightning: the callback does what a loop by hand does, and resuming changes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.surgery import get_record
from tests.support.models.integration_models import (
    METHOD,
    MODELS,
    Batch,
    build,
    by_hand,
    collate,
    example,
    optimizer_of,
    same,
    schedule_of,
)

lightning = pytest.importorskip("lightning.pytorch")
from etp_graph.integrations.lightning import Epochs, PruningCallback, cut_  # noqa: E402

EPOCHS, PER_EPOCH, PRUNE = 4, 2, 4


class Lit(lightning.LightningModule):  # type: ignore[misc]
    """A model from the tests as the submodule ``net``."""

    def __init__(self, name: str = "cnn", optimizer: str = "adam") -> None:
        super().__init__()
        self.net = build(name)
        for module in self.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # Lightning does not keep the state of random generators
        self.optimizer = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self.net(**batch)["loss"]
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        self.log("step", float(self.trainer.global_step))

    def test_step(self, batch: Batch, index: int) -> None:
        self.log("test", float(self.net(**batch)["loss"]))

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.net, self.optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule_of(optimizer), "interval": "step"}}


def callback(name: str = "cnn", **options: Any) -> PruningCallback:
    inputs = example(name)
    return PruningCallback(inputs, **{"module": "net", "speed_up": 1.5, "prune_at": PRUNE, "method": METHOD, **options})


def data(name: str, n_steps: int, *, parts: int = 1) -> Any:
    return torch.utils.data.DataLoader(MODELS[name][1](4 * n_steps * parts), batch_size=4, collate_fn=collate)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    checkpoints = lightning.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    return lightning.Trainer(**{
        "default_root_dir": folder, "max_epochs": EPOCHS, "accelerator": "cpu", "logger": False, "devices": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [*callbacks, checkpoints],
        "num_sanity_val_steps": 0, **options,
    })  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
        yield


@pytest.mark.parametrize(
    ("name", "method", "parts", "optimizer"),
    [("cnn", "etp", 1, "sgd"), ("cnn", "torque", 2, "adam"), ("cnn", "l1", 1, "adam"),
     ("bert", "etp", 2, "adam"), ("llama", "etp", 2, "adam")],
)  # fmt: skip
def test_fit_does_what_a_loop_by_hand_does(name: str, method: str, parts: int, optimizer: str, tmp_path: Path) -> None:
    chosen = METHOD if method == "etp" else etp.methods.get(method)
    model, loader = Lit(name, optimizer), data(name, PER_EPOCH, parts=parts)
    run = trainer(tmp_path, accumulate_grad_batches=parts, gradient_clip_val=1.0,
                  enable_checkpointing=False, callbacks=[callback(name, method=chosen)])  # fmt: skip
    run.fit(model, loader)
    other, batches = Lit(name, optimizer), list(loader)
    steps = [batches[i * parts : (i + 1) * parts] for i in range(PER_EPOCH)] * EPOCHS
    losses = by_hand(
        other.net, steps, example_inputs=example(name), prune_step=PRUNE, method=chosen, optimizer=optimizer, clip=1.0,
        loss_of=lambda model, parts, part: model(**part)["loss"] / len(parts),
    )  # fmt: skip
    assert [loss / parts for loss in model.losses] == losses
    assert same(model.net, other.net)
    assert get_record(model.net) == get_record(other.net) != get_record(build(name))


@pytest.mark.parametrize("name", MODELS)
def test_resuming_before_and_after_surgery_equals_the_run_without_a_break(name: str, tmp_path: Path) -> None:
    whole, loader = Lit(name), data(name, PER_EPOCH)
    first = trainer(tmp_path, callback(name))
    first.fit(whole, loader)
    for step in (2, PRUNE, PRUNE + 2):
        again = Lit(name)
        second = trainer(tmp_path / "again", callback(name))
        second.fit(again, loader, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.losses == whole.losses[step:]
        assert same(again, whole)
        assert get_record(again.net) == get_record(whole.net)
        states = [run.optimizers[0].state_dict()["state"] for run in (second, first)]
        assert all(torch.equal(states[0][key][part], value) for key, entry in states[1].items()
                   for part, value in entry.items())  # fmt: skip


def test_a_checkpoint_cuts_a_dense_model_for_testing_and_outside_of_a_trainer(tmp_path: Path) -> None:
    model, loader = Lit(), data("cnn", PER_EPOCH)
    run = trainer(tmp_path, callback())
    run.fit(model, loader)
    last, early = tmp_path / f"step={EPOCHS * PER_EPOCH}.ckpt", tmp_path / "step=1.ckpt"
    tested = Lit()
    trainer(tmp_path / "test", callback()).test(tested, loader, ckpt_path=last, verbose=False)
    assert same(tested, model)
    assert "on_load_checkpoint" not in tested.__dict__

    class Cutting(Lit):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            cut_(self, checkpoint, module="net")

    assert same(Cutting.load_from_checkpoint(last), model)
    with pytest.raises(etp.CheckpointError, match="no record of surgery"):
        run.test(model, loader, ckpt_path=early, verbose=False)
    etp.save(model.net, tmp_path / "pruned")
    assert same(etp.load(tmp_path / "pruned", build=Lit().net), model.net)
    other = Lit()
    trainer(tmp_path / "other", callback(speed_up=3)).fit(other, loader)
    with pytest.raises(etp.CheckpointError, match="cut in another way"):
        cut_(other, torch.load(last, weights_only=False), module="net")


def test_the_best_model_is_one_from_after_surgery(tmp_path: Path) -> None:
    best = lightning.callbacks.ModelCheckpoint(tmp_path, filename="best", monitor="step", mode="min")
    patience = lightning.callbacks.EarlyStopping("step", mode="min", patience=3)
    model, loader = Lit(), data("cnn", PER_EPOCH)
    # The metric rises with every step: the first model is the best of all, the one of surgery the best there.
    run = trainer(tmp_path, callbacks=[best, patience, callback()], max_epochs=20)
    run.fit(model, loader, data("cnn", 1))
    assert float(best.best_model_score) == PRUNE
    assert run.global_step == PRUNE + 3 * PER_EPOCH
    run.test(model, loader, ckpt_path="best", verbose=False)
    assert get_record(model.net).selections


@pytest.mark.parametrize("prune_at", [3, 0.5, Epochs(2), Epochs(0.5)])
def test_surgery_takes_place_after_a_step_a_share_or_epochs(prune_at: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(prune_at=prune_at), accumulate_grad_batches=3)
    run.fit(Lit(), data("cnn", 5))  # two steps an epoch
    expected = {3: 3, 0.5: 4, Epochs(2): 4, Epochs(0.5): 1}[prune_at]
    for step in range(1, EPOCHS * 2 + 1):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert ("etp_graph" in checkpoint) == (step >= expected)


def test_autocast_leaves_the_plan_and_the_weights_in_full_precision(tmp_path: Path) -> None:
    pruning, model = callback("bert"), Lit("bert")
    trainer(tmp_path, pruning, precision="bf16-mixed").fit(model, data("bert", PER_EPOCH))
    assert pruning.plan == etp.trace(build("bert"), example("bert"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert get_record(model.net).selections


def test_the_whole_module_is_traced_without_a_name(tmp_path: Path) -> None:
    class Whole(Lit):
        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)["logits"]

    model = Whole()
    trainer(tmp_path, callback(module="")).fit(model, data("cnn", PER_EPOCH))
    again = Whole()
    trainer(tmp_path / "x", callback(module="")).fit(again, data("cnn", PER_EPOCH), ckpt_path=tmp_path / "step=6.ckpt")
    assert same(model, again)


def test_two_optimizers_are_one_training(tmp_path: Path) -> None:
    class Two(Lit):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            parts = (self.net.body[:4], self.net.body[4:])
            return [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts]

        def training_step(self, batch: Batch, index: int) -> None:
            self.manual_backward(super().training_step(batch, index))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    model, pruning = Two(), callback()
    dense = sum(p.numel() for p in model.parameters())
    run = trainer(tmp_path, pruning)
    run.fit(model, data("cnn", PER_EPOCH))
    assert len(model.losses) == EPOCHS * PER_EPOCH == run.global_step // 2
    assert pruning.selection is not None and sum(p.numel() for p in model.parameters()) < dense
    for optimizer in run.optimizers:
        for parameter, state in optimizer.state.items():
            assert state["momentum_buffer"].shape == parameter.shape


def test_what_cannot_work_is_refused_and_errors_leave_no_force_behind(tmp_path: Path) -> None:
    with pytest.raises(etp.ForceError, match="prune earlier"):
        trainer(tmp_path, callback(prune_at=99)).fit(Lit(), data("cnn", 2))

    class Broken(Lit):
        def training_step(self, batch: Batch, index: int) -> Tensor:
            if self.trainer.global_step == 1:
                raise KeyError
            return super().training_step(batch, index)

    run = trainer(tmp_path, callback())
    with pytest.raises(KeyError):
        run.fit(Broken(), data("cnn", 2))
    assert not run.optimizers[0]._optimizer_step_post_hooks
