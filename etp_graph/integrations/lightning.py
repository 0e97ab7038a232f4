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
from etp_graph.errors import CheckpointError, ForceError, PlanError
from etp_graph.model import all_tensors
from etp_graph.surgery import SurgeryRecord, get_record

from .core import Epochs, Pruning

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
except ModuleNotFoundError as error:
    raise ImportError(
        "etp_graph.integrations.lightning needs lightning: pip install 'etp-graph[lightning]'."
    ) from error


__all__ = ["Epochs", "PruningCallback", "cut_"]

_KEY = "etp_graph"


class PruningCallback(Pruning, Callback):
    """A sparse phase, surgery and fine-tuning in one ``fit()``, with the module's optimizer and scheduler.

    ``Trainer(callbacks=[PruningCallback(example_inputs, speed_up=2, prune_at=0.5)])``. Surgery takes place when its
    step is done, before that step is validated and saved. ``fit(dense_model, ckpt_path=...)`` continues from before or
    after surgery, ``test(dense_model, ckpt_path=...)`` cuts the model, too.

    At surgery every ``ModelCheckpoint`` and ``EarlyStopping`` begins anew to look for the best: a dense model is no
    candidate. The files of those before stay. The trainer runs in one process or with ``strategy="ddp"``, and has one
    optimizer.

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
        """Lightning loads weights before it hands checkpoints to callbacks: the cut rides on the module's own hook."""
        self._fitting = stage == "fit"
        loading = pl_module.on_load_checkpoint

        def cut_before_loading(checkpoint: dict[str, Any]) -> None:
            loading(checkpoint)
            cut_(pl_module, checkpoint, module=self.module)

        pl_module.__dict__["on_load_checkpoint"] = cut_before_loading

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are loaded: the module has its own hook again."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module has its own hook again."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace and attach the force, or go on after surgery."""
        together = trainer.world_size > 1
        if together and not isinstance(trainer.strategy.model, DistributedDataParallel):
            raise PlanError(
                f"the trainer runs {trainer.world_size} processes by {type(trainer.strategy).__name__}, and this "
                'callback knows DistributedDataParallel: use strategy="ddp", or one process.'
            )
        if len(trainer.optimizers) != 1:
            raise ForceError(f"found {len(trainer.optimizers)} optimizers: one has to hold all parameters of the plan.")
        self.begin(
            self._part(pl_module), trainer.optimizers[0], done=trainer.global_step,
            total=_whole(trainer.estimated_stepping_batches),
            per_epoch=_whole(trainer.num_training_batches / trainer.accumulate_grad_batches), together=together,
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Surgery, if it is time."""
        if self.advance(trainer.global_step):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                _forget_best(callback)
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                trainer.strategy.model = rewrap(trainer.strategy.model)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No force acts any more."""
        self.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """No force acts any more."""
        self.abort()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the record of surgery into the checkpoint, with those tensors that its weights lack."""
        part, weights = self._part(pl_module), _weights(checkpoint, self.module)
        if get_record(part) != SurgeryRecord():
            manifest, tensors = describe_model(part), all_tensors(part)
            extra = {name: tensors[name].detach().cpu() for name in manifest.tensors if name not in weights}
            checkpoint[_KEY] = {"manifest": manifest.to_json(), "extra": extra}

    def state_dict(self) -> dict[str, Any]:
        """The state of the pruning, for Lightning's checkpoints."""
        return self.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, if the trainer fits."""
        if self._fitting:
            self.load_state(state_dict)

    def _part(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.get_submodule(self.module)


def cut_(pl_module: nn.Module, checkpoint: Mapping[str, Any], *, module: str = "") -> None:
    """Cut a dense module as the checkpoint's was, before its weights are loaded.

    The callback does it for a trainer. For ``load_from_checkpoint``, which knows no callbacks, call it in the module's
    own ``on_load_checkpoint(self, checkpoint)``. A module that was cut in the same way already stays as it is.

    Args:
        checkpoint: what ``torch.load`` reads from the file.
        module: name of the submodule that was pruned, as in the callback.

    Raises:
        CheckpointError: the module was cut in another way, or the record does not fit it or the weights.
    """
    part, weights, entry = pl_module.get_submodule(module), _weights(checkpoint, module), checkpoint.get(_KEY)
    if entry is None:
        _check_shapes(part, weights)
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


def _check_shapes(part: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in part.state_dict().items():
        if name in weights and weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} is saved as {list(weights[name].shape)}, the module has {list(tensor.shape)}, and the "
                "checkpoint has no record of surgery: build the dense module anew for a checkpoint from before "
                "surgery. Checkpoints of weights alone (save_weights_only=True) lack the record."
            )


def _weights(checkpoint: Mapping[str, Any], module: str) -> dict[str, Tensor]:
    """The weights of the submodule under its own names."""
    prefix = f"{module}." if module else ""
    return {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }


def _whole(number: float) -> int | None:
    """Rounded up; ``None`` if it is not finite, which means unknown."""
    return math.ceil(number) if math.isfinite(number) and number >= 0 else None


def _forget_best(callback: Callback) -> None:
    """The best so far was a dense model, whose weights would not fit any more."""
    if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
        callback.best_k_models, callback.best_model_path, callback.kth_best_model_path = {}, "", ""
        callback.best_model_score, callback.current_score = None, None
        callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
    if isinstance(callback, EarlyStopping):
        callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        callback.wait_count = 0
