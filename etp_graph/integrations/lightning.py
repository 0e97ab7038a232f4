"""Pruning inside Lightning's ``Trainer``: sparse phase, surgery and fine-tuning in one ``fit()``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from etp_graph.checkpoint import describe_model, parse_manifest, restore_
from etp_graph.distributed import rewrap
from etp_graph.errors import CheckpointError, PlanError
from etp_graph.model import all_tensors
from etp_graph.surgery import SurgeryRecord, get_record

from ._state import require_equal_shapes
from .core import Epochs, Pruning, check_state

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
except ModuleNotFoundError as error:
    raise ImportError(
        "etp_graph.integrations.lightning needs lightning: pip install 'etp-graph[lightning]'."
    ) from error


__all__ = ["Epochs", "PruningCallback", "cut_"]

_KEY = "etp_graph"

_NO_RECORD = (
    "the checkpoint has no record of surgery. Build the dense module anew for a checkpoint from before surgery. "
    "Checkpoints of weights alone (save_weights_only=True) lack the record."
)


class PruningCallback(Pruning, Callback):
    """A sparse phase, surgery and fine-tuning in one ``fit()``, with the module's optimizer and scheduler.

    Use it as ``Trainer(callbacks=[PruningCallback(example_inputs, speed_up=2, prune_at=0.5)])``. Surgery takes place
    after its step, before the trainer validates and saves that step. ``fit(dense_model, ckpt_path=...)`` resumes from
    a checkpoint from before or after surgery. ``test(dense_model, ckpt_path=...)`` prunes the dense model as in the
    checkpoint before it loads the weights.

    At surgery every ``ModelCheckpoint`` and ``EarlyStopping`` forgets the best value so far, which a dense model
    reached. Files of earlier checkpoints are kept. The trainer must run in one process or with ``strategy="ddp"``. If
    it has several optimizers, each must step equally often; a step of the pruning is then one of each.

    Args:
        example_inputs: as for :func:`etp_graph.trace`.
        module: name of the submodule to prune, such as ``"net"``; default: the whole ``LightningModule``, whose
            ``forward`` is traced.
        options: see :class:`etp_graph.integrations.core.Pruning`.
    """

    def __init__(self, example_inputs: Any, *, module: str = "", **options: Any) -> None:
        super().__init__(example_inputs, **options)
        self.module = module
        self._fitting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the module's ``on_load_checkpoint`` prune the module.

        Lightning calls this hook before it loads the weights, and passes the checkpoint to callbacks only afterwards.
        """
        self._fitting = stage == "fit"
        loading = pl_module.on_load_checkpoint

        def cut_before_loading(checkpoint: dict[str, Any]) -> None:
            loading(checkpoint)
            if (state := checkpoint.get("callbacks", {}).get(self.state_key)) is not None:
                check_state(state)  # before the module changes
            cut_(pl_module, checkpoint, module=self.module)

        pl_module.__dict__["on_load_checkpoint"] = cut_before_loading

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the module's own ``on_load_checkpoint``, because the weights are loaded."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's own ``on_load_checkpoint``."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace and attach the force; if training is resumed after surgery, only check the model."""
        together = trainer.world_size > 1
        if together and not isinstance(trainer.strategy.model, DistributedDataParallel):
            raise PlanError(
                f"the trainer runs {trainer.world_size} processes by {type(trainer.strategy).__name__}, and this "
                'callback knows DistributedDataParallel: use strategy="ddp", or one process.'
            )
        self.begin(
            self._part(pl_module), trainer.optimizers, done=_steps_done(trainer),
            total=_whole(trainer.estimated_stepping_batches),
            per_epoch=_whole(trainer.num_training_batches / trainer.accumulate_grad_batches), together=together,
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Perform surgery if it is due."""
        if self.advance(_steps_done(trainer)):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                _forget_best(callback)
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                trainer.strategy.model = rewrap(trainer.strategy.model)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the force."""
        self.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the force."""
        self.abort()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint the record of surgery, and the tensors that its weights lack, such as buffers."""
        part, weights = self._part(pl_module), _weights(checkpoint, self.module)
        if get_record(part) != SurgeryRecord():
            manifest, tensors = describe_model(part), all_tensors(part)
            extra = {name: tensors[name].detach().cpu() for name in manifest.tensors if name not in weights}
            checkpoint[_KEY] = {"manifest": manifest.to_json(), "extra": extra}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the pruning, for Lightning's checkpoints."""
        return self.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state of :meth:`state_dict`. Ignored unless the trainer runs ``fit``."""
        if self._fitting:
            self.load_state(state_dict)

    def _part(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.get_submodule(self.module)


def cut_(pl_module: nn.Module, checkpoint: Mapping[str, Any], *, module: str = "") -> None:
    """Prune a dense module in place as the checkpoint's module was pruned, before its weights are loaded.

    In a trainer, the callback calls this function. ``load_from_checkpoint`` uses no callbacks: for it, call this
    function in the module's own ``on_load_checkpoint(self, checkpoint)``. A module that is already pruned in the same
    way stays unchanged.

    Args:
        pl_module: the ``LightningModule``.
        checkpoint: the content of the file, as ``torch.load`` returns it.
        module: name of the submodule that was pruned, as in the callback.

    Raises:
        CheckpointError: the module was pruned in another way, or the record does not fit the module or the weights.
    """
    part, weights, entry = pl_module.get_submodule(module), _weights(checkpoint, module), checkpoint.get(_KEY)
    if entry is None:
        require_equal_shapes(part.state_dict(), weights, remedy=_NO_RECORD)
        return
    manifest = parse_manifest(str(entry["manifest"]).encode(), where="the checkpoint")
    if get_record(part) == manifest.record:
        return
    if get_record(part) != SurgeryRecord():
        raise CheckpointError("the module was cut in another way than this checkpoint's: build the dense one anew.")
    tensors = {name: weights.get(name, entry["extra"].get(name)) for name in manifest.tensors}
    for name, info in manifest.tensors.items():
        value = tensors[name]
        if value is None or tuple(value.shape) != info.shape:
            found = "missing" if value is None else f"{list(value.shape)}"
            raise CheckpointError(f"the checkpoint: {name} is {found}, its record says {list(info.shape)}. Restore it.")
    restore_(part, manifest, {name: value for name, value in tensors.items() if value is not None})


def _weights(checkpoint: Mapping[str, Any], module: str) -> dict[str, Tensor]:
    """Return the checkpoint's weights of the submodule, with names relative to the submodule."""
    prefix = f"{module}." if module else ""
    return {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }


def _steps_done(trainer: Trainer) -> int:
    """Return the number of steps of each optimizer; the trainer counts the steps of all of them."""
    return trainer.global_step // max(1, len(trainer.optimizers))


def _whole(number: float) -> int | None:
    """Return the number rounded up; ``None`` if it is infinite, NaN or negative, which means unknown."""
    return math.ceil(number) if math.isfinite(number) and number >= 0 else None


def _forget_best(callback: Callback) -> None:
    """Reset the best value of a callback. A dense model reached it, and its weights do not fit the pruned model."""
    if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
        callback.best_k_models, callback.best_model_path, callback.kth_best_model_path = {}, "", ""
        callback.best_model_score, callback.current_score = None, None
        callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
    if isinstance(callback, EarlyStopping):
        callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        callback.wait_count = 0
