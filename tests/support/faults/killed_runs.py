"""What the processes do that the tests kill: a run of ``compress``, and a ``Trainer`` with the pruning callback."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from tests.support.faults.interrupted import Loop, run, seed, toy


def compressed(folder: Path) -> None:
    """Begin or continue; leave the weights behind."""
    _begin(folder)
    model = toy()
    seed()  # nothing is known of the generators before the first step is finished
    run(model, Loop(), folder / "run")
    _leave(model, folder)


def trained(folder: Path) -> None:
    """As the user of a cluster would write it: continue from the newest checkpoint, if there is one."""
    from transformers import Trainer, TrainingArguments

    from etp_graph.integrations.transformers import PruningCallback, last_checkpoint
    from tests.support.models.integration_models import Net, images

    warnings.simplefilter("ignore")
    _begin(folder)
    data = images(16)
    torch.manual_seed(4)
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=8, per_device_train_batch_size=4, save_strategy="steps", save_steps=1,
        use_cpu=True, report_to="none", disable_tqdm=True, log_level="error", seed=4, save_total_limit=3,
    )  # fmt: skip
    pruning = PruningCallback({"images": data[0]["images"][None]}, speed_up=1.5, prune_at=4)
    trainer = Trainer(Net(), arguments, train_dataset=data, callbacks=[pruning])
    last = last_checkpoint(folder / "run")
    if last is not None:
        pruning.resume(trainer.model, last)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    _leave(trainer.model, folder)


def _begin(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    (folder / "began").touch()


def _leave(model: torch.nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "half.pt")
    (folder / "half.pt").replace(folder / "weights.pt")
    os._exit(0)
