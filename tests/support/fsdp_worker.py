"""What each process of the tests of FSDP2 does; a module of its own, because spawned processes import it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import etp_graph as etp
from etp_graph import fsdp
from etp_graph.surgery import get_record
from tests.support.models.fsdp_models import BATCH, bert, cnn, llama, pictures, tokens
from tests.support.spawning import join_group

PRUNE = 2
State = dict[str, Tensor]


LAYERS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "cnn": lambda model: [model[0], model[2]],
    "bert": lambda model: list(model.bert.encoder.layer),
    "llama": lambda model: list(model.model.layers),
}


@dataclass(frozen=True)
class Life:
    """One training: which model, in which numbers, with which optimizer, force and placement."""

    model: Literal["cnn", "bert", "llama"]
    dtype: Literal["float64", "float32", "mixed"]
    optimizer: Literal["sgd", "adamw"]
    mode: Literal["prox", "gradient", "loss", "auto"]
    layout: Literal["rows", "columns", "hybrid"]

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}-{self.optimizer}-{self.mode}-{self.layout}"

    def build(self) -> nn.Module:
        """The dense model."""
        model = {"cnn": cnn, "bert": bert, "llama": llama}[self.model]()
        return model.double() if self.dtype == "float64" else model

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The data of all steps, of all ranks together."""
        generator = torch.Generator().manual_seed(2)
        found = []
        for _ in range(PRUNE + 2):
            x = pictures(generator) if self.model == "cnn" else tokens(generator)
            x = x.double() if self.dtype == "float64" and x.is_floating_point() else x
            found.append((x, torch.randint(4, (BATCH,), generator=generator)))
        return found

    def held(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)  # noise in a gradient of zero stays noise

    def force(self, model: nn.Module, plan: etp.Plan) -> etp.Regularizer:
        """The force."""
        if self.mode == "auto":
            method = etp.methods.get("etp")
            found = method.regularizer(model, plan, steps=PRUNE, budget=etp.Budget(speed_up=1.5))
            assert found is not None
            return found
        return etp.Regularizer(model, plan, beta=0.02, order="importance", refresh_every=1, mode=self.mode)

    def select(self, model: nn.Module, plan: etp.Plan, force: etp.Regularizer) -> etp.Selection:
        """Which units stay."""
        scores = etp.criteria.etp(model, plan, regularizer=force)
        return etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=1.5))

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """The kinds of units that are pruned."""
        return None if self.model == "cnn" else ("heads", "neurons")

    def shard(self, model: nn.Module) -> None:
        """FSDP2 on each layer and on the whole model."""
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (size,))
        if self.layout == "hybrid":
            mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        columns = self.layout == "columns"
        options: dict[str, Any] = {"mesh": mesh}
        if columns:  # FSDP2 divides other axes than the first only evenly
            options["shard_placement_fn"] = lambda p: Shard(int(p.ndim > 1 and p.shape[1] % size == 0))
        if self.dtype == "mixed":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in LAYERS[self.model](model):
            fully_shard(layer, **options)
        fully_shard(model, **options)


def loss_of(out: Any, y: Tensor) -> Tensor:
    logits = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, y)


def whole(model: nn.Module) -> State:
    """The values of all parameters, gathered; every rank calls this."""
    found = {}
    for name, parameter in model.named_parameters():
        full: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # type: ignore
        found[name] = full.detach().clone()
    return found


class Counted:
    """How often processes talked to each other in the steps of the optimizer, by name of the function."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        names = "all_reduce all_gather_into_tensor all_gather_single all_gather broadcast".split()
        kept = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
        for name, function in kept.items():
            setattr(dist, name, lambda *a, _name=name, _of=function, **k: (self.calls.append(_name), _of(*a, **k))[1])
        try:
            optimizer.step()
        finally:
            for name, function in kept.items():
                setattr(dist, name, function)
        optimizer.zero_grad()


def live(life: Life, rank: int, size: int, folder: Path) -> None:
    """Trace, train, cut, train, save, train; leave behind what came of it."""
    batches = life.batches()
    model, plan = fsdp.prepare(life.build, batches[0][0][:1], shard=life.shard, prune=life.kinds)
    optimizer, counted = life.held(model), Counted()
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    losses = []

    def step(number: int, force: etp.Regularizer | None = None) -> None:
        x, y = batches[number]
        loss = loss_of(model(x[mine]), y[mine])
        losses.append(float(loss.detach()))
        if force is not None and life.mode == "loss":
            loss = loss + force.penalty()
        loss.backward()
        counted.step(optimizer)

    with life.force(model, plan).attach(optimizer) as force:
        for number in range(PRUNE):
            step(number, force)
    calls, before = counted.calls, whole(model)
    chosen = life.select(model, plan, force)
    model = fsdp.prune(model, plan, chosen if rank == 0 else None, build=life.build, shard=life.shard,
                       optimizer=optimizer)  # fmt: skip
    step(PRUNE)
    fsdp.save(model, folder / str(life), optimizer=optimizer)
    step(PRUNE + 1)
    left = {"before": before, "after": whole(model), "losses": losses, "calls": calls, "selection": chosen.to_json()}
    torch.save(left, folder / f"{life}-{rank}.pt")


def resume(life: Life, rank: int, size: int, folder: Path) -> None:
    """The last step again, from the files, on another number of ranks."""
    x, y = life.batches()[PRUNE + 1]
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    model = fsdp.load(folder / str(life), build=life.build, shard=life.shard)
    optimizer = life.held(model)
    fsdp.load_optimizer_(model, optimizer, folder / str(life))
    loss_of(model(x[mine]), y[mine]).backward()
    optimizer.step()
    left = {"after": whole(model), "rounds": len(get_record(model).selections)}
    torch.save(left, folder / f"{life}-resumed-{rank}.pt")


GRIDS: list[tuple[Placement, Placement]] = [
    (Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Shard(1)),
    (Replicate(), Replicate()),
]  # fmt: skip


def grids(rank: int, size: int, folder: Path) -> None:
    """One step of the force on models without FSDP, whose parameters lie on a grid of processes."""
    mesh = init_device_mesh("cpu", (2, size // 2))
    for number, placements in enumerate(GRIDS):
        model = cnn().double()
        plan = etp.trace(model, torch.zeros(1, 2, 8, 8, dtype=torch.float64), check=False)
        for module in model:  # type: ignore[attr-defined]
            for name, parameter in list(module.named_parameters()):
                flat = [Shard(0) if p.is_shard() else p for p in placements]
                where = placements if parameter.ndim > 1 else flat
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, where)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with etp.Regularizer(model, plan, beta=0.05, order="importance").attach(optimizer):
            optimizer.step()
        torch.save(whole(model), folder / f"grid-{number}-{rank}.pt")


def all_lives(rank: int, size: int, folder: Path, lives: list[Life], again: bool) -> None:
    """What each process does."""
    join_group(rank, size, folder / f"store-{size}")
    for life in lives:
        (resume if again else live)(life, rank, size, folder)
    if not again:
        grids(rank, size, folder)
    dist.barrier()
    dist.destroy_process_group()


def mistakes(rank: int, size: int, folder: Path) -> None:
    """What is said about mistakes of one rank or of both, and about a rank that dies."""
    join_group(rank, size, folder / "store", timedelta(seconds=20))
    life = Life("cnn", "float64", "sgd", "prox", "rows")
    said: list[str] = []

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except etp.EtpError as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("no error")

    x, y = life.batches()[0]
    model, plan = fsdp.prepare(life.build, x[:1], shard=life.shard)
    first = model[0].weight.to_local()  # type: ignore[index, operator, union-attr]
    if rank == 1:
        first.detach()[0, 0, 0, 0] = torch.nan
    attempt(lambda: etp.Regularizer(model, plan))
    first.detach().nan_to_num_()
    odd = life.build()
    mesh = init_device_mesh("cpu", (size,))
    odd[0].weight = nn.Parameter(DTensor.from_local(odd[0].weight.detach(), mesh, [Partial()]))  # type: ignore[index]
    attempt(lambda: etp.Regularizer(odd, plan))
    half = etp.Selection({"0": torch.arange(10) < 4})  # type: ignore[dict-item]
    attempt(lambda: etp.prune_(model, plan, half))
    attempt(lambda: etp.save(model, folder / f"single-{rank}"))

    def cut(build: Callable[[], nn.Module] = life.build, **options: Any) -> object:
        return fsdp.prune(model, plan, options.pop("selection", half), build=build, shard=life.shard, **options)

    def on_cpu() -> nn.Module:
        with torch.device("cpu"):
            return life.build()

    attempt(lambda: cut(selection=None if rank == 0 else half))
    attempt(lambda: cut(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())))
    attempt(lambda: cut(on_cpu if rank == 1 else life.build))
    (folder / "file").write_text("not a folder")
    dist.barrier()
    attempt(lambda: fsdp.save(model, folder / "file" / "below"))
    saved = fsdp.save(model, folder / "saved")
    attempt(lambda: fsdp.save(model, folder / "saved"))
    optimizer = life.held(model)
    force = life.force(model, plan).attach(optimizer)
    with torch.no_grad():
        model(x)  # the root stays gathered after a forward, until it is sharded again
    attempt(optimizer.step)
    torch.save(said, folder / f"said-{rank}.pt")
    loss_of(model(x), y).backward()
    dist.barrier()
    if rank == 1:
        os._exit(0)
    content = {file.name: file.read_bytes() for file in saved.iterdir()}
    said.clear()
    attempt(optimizer.step)
    force.detach()
    attempt(lambda: fsdp.save(model, saved, overwrite=True))
    same = content == {file.name: file.read_bytes() for file in saved.iterdir()}
    torch.save({"said": said, "same": same}, folder / "survivor.pt")
    os._exit(0)  # destroying the group would wait for the dead
