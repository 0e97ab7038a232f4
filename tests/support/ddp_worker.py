"""What each process of the tests of DDP does; a module of its own, because spawned processes import it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import etp_graph as etp
from etp_graph import distributed, methods
from etp_graph.distributed import _ddp
from etp_graph.surgery import PreparedChanges
from etp_graph.surgery._commit import Change

STEPS, PRUNE, BATCH = 6, 3, 8


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.GELU(), nn.Conv2d(8, 6, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    ).double()  # fmt: skip


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(BATCH, 2, 8, 8, generator=generator, dtype=torch.float64),
             torch.randint(4, (BATCH,), generator=generator)) for _ in range(STEPS)]  # fmt: skip


def train(rank: int, size: int, mode: str, optimizer: str, group: Any = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model after all steps, and a copy of its state before surgery; ``size`` 1: one process, the whole batch."""
    method = replace(methods.get("etp"), beta=0.03, acts_on="units", mode=mode)
    model = build()
    if rank:  # DDP sends rank 0's weights to the others
        nn.init.zeros_(model[0].weight)
    runner: nn.Module = DDP(model, process_group=group) if size > 1 else model
    held = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if optimizer == "sgd"
            else torch.optim.AdamW(model.parameters(), lr=0.01))  # fmt: skip
    plan = etp.trace(model, data()[0][0][:1])
    force = method.regularizer(model, plan)
    assert force is not None
    force.attach(held)
    before: dict[str, Tensor] = {}
    for step, (x, y) in enumerate(data(), 1):
        part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        nn.functional.cross_entropy(runner(x[part]), y[part]).backward()
        held.step()
        held.zero_grad()
        if step == PRUNE:
            before = {key: value.clone() for key, value in model.state_dict().items()}
            selection = None
            if rank == 0:
                scores = method.scores(model, plan, regularizer=force)
                selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=2))
            force.detach()
            if size > 1:
                distributed.prune_(model, plan, selection, optimizer=held, group=group)
                assert isinstance(runner, DDP)
                runner = distributed.rewrap(runner)
            else:
                assert selection is not None
                etp.prune_(model, plan, selection, optimizer=held)
    return model, before


def work(rank: int, size: int, folder: str, runs: list[tuple[str, str]]) -> None:
    """Train on all ranks, then on two, then make mistakes; leave what came of it behind."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    two = dist.new_group([0, 1])
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}  # fmt: skip
    for n, group in ((size, None), (2, two)):
        for mode, optimizer in runs if rank < n else ():
            model, before = train(rank, n, mode, optimizer, group)
            torch.save((before, model.state_dict()), Path(folder) / f"{mode}-{optimizer}-{rank}-of-{n}.pt")
    if importlib.util.find_spec("lightning"):
        torch.save(by_lightning(rank, size), Path(folder) / f"lightning-{rank}.pt")
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate"):
        torch.save(by_trainer(rank, size, folder), Path(folder) / f"trainer-{rank}.pt")
    if rank < 2:
        torch.save(refusals(rank, two), Path(folder) / f"said-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def by_lightning(rank: int, size: int) -> dict[str, Tensor]:
    """The state after the same training by Lightning, in the group that is there."""
    import lightning.pytorch as pl

    from etp_graph.integrations.lightning import PruningCallback

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    dataset = torch.utils.data.TensorDataset(x, y)
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=size, rank=rank, shuffle=False)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH // size, sampler=sampler)
    method = replace(methods.get("etp"), beta=0.03, acts_on="units")
    pruning = PruningCallback(x[:1], module="net", speed_up=2, prune_at=PRUNE, method=method)
    model = Lit()
    pl.Trainer(
        accelerator="cpu", strategy="ddp", devices=size, max_epochs=1, callbacks=[pruning], logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, loader)  # fmt: skip
    return dict(model.net.state_dict())


def by_trainer(rank: int, size: int, folder: str) -> dict[str, Tensor]:
    """The state after the same training by Hugging Face's trainer."""
    from transformers import Trainer, TrainingArguments

    from etp_graph.integrations.transformers import PruningCallback

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            out = {"logits": self.net(x)}
            return out if labels is None else {"loss": nn.functional.cross_entropy(out["logits"], labels), **out}

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    items = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    method = replace(methods.get("etp"), beta=0.03, acts_on="units")
    pruning = PruningCallback({"x": x[:1]}, speed_up=2, prune_at=PRUNE, method=method)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arguments = TrainingArguments(
        f"{folder}/trainer", num_train_epochs=1, per_device_train_batch_size=BATCH // size, report_to="none",
        use_cpu=True, ddp_backend="gloo", max_grad_norm=0, disable_tqdm=True, save_steps=STEPS, log_level="error",
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    InOrder(model, arguments, train_dataset=items, optimizers=(optimizer, constant), callbacks=[pruning]).train()
    return dict(model.net.state_dict())


def refusals(rank: int, group: Any) -> list[str]:
    """What is said about mistakes of one rank."""
    said = []

    def attempt(model: nn.Module, *arguments: Any, **options: Any) -> None:
        try:
            distributed.prune_(model, *arguments, **options, group=group)
        except etp.EtpError as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("no error")

    model = build()
    plan = etp.trace(model, data()[0][0][:1])
    half = etp.Selection({"0": torch.arange(8) < 4})  # type: ignore[dict-item]
    attempt(DDP(model, process_group=group), plan, half)
    attempt(model, plan.lock({"2": "not here"}) if rank == 1 else plan, half)
    attempt(model, plan, None if rank == 0 else half)
    attempt(model, plan, etp.Selection({"0": torch.arange(8) < 0}))  # type: ignore[dict-item]
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters())
    attempt(model, plan, half, optimizer=stranger if rank == 1 else None)
    for at in ("prepare_surgery", "commit"):
        with failing(at) if rank == 1 else nullcontext():
            attempt(model, plan, half)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in build().state_dict().items()
    }
    attempt(model, plan, half)
    return said


@contextmanager
def failing(at: str) -> Iterator[None]:
    """Raise a MemoryError where surgery is prepared, or in the middle of its commit."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("no room")

    if at == "commit":
        changes = PreparedChanges.commit

        def half_way(surgery: PreparedChanges) -> None:
            surgery._changes.insert(2, Change(fail, lambda: None))
            changes(surgery)

        place, name, value = PreparedChanges, "commit", half_way
    else:
        place, name, value = _ddp, at, fail
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)
